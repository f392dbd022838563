"""Access to what lies on both sides of a decoder's output head: its input and its weight.

torchtune 0.6.1 has no switch that leaves the head out of ``TransformerDecoder.forward``, and its heads come in
five kinds. A loss that never holds full logits needs the last hidden states and the head's weight instead.

Shapes: B batch, S sequence, D hidden width, V vocabulary, R LoRA rank.
"""

import types

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import DoRALinear, LoRALinear
from torchtune.modules.tied_linear import TiedLinear


def skip_output_head(model: TransformerDecoder) -> TransformerDecoder:
    """Make ``model(tokens, ...)`` return its last hidden states [B, S, D], after the final norm, not logits.

    Everything else of the forward pass (masks, positions, hooks, checkpointed or compiled layers) stays as it is;
    the parameters and their names do not change. In place; the head is then read with :func:`output_head`.

    Args:
        model (TransformerDecoder): the decoder to change.

    Returns:
        TransformerDecoder: the same object.

    Raises:
        ValueError: if ``model`` is no ``TransformerDecoder`` (multimodal models are not supported).
    """
    if not isinstance(model, TransformerDecoder):
        raise ValueError(
            f"Expected a torchtune TransformerDecoder, got {type(model).__name__}: "
            "distillation works on text decoders; name such a builder under `model` and `teacher_model`."
        )
    model.unembed = types.MethodType(_norm_only, model)
    return model


def _norm_only(self: TransformerDecoder, h: Tensor) -> Tensor:
    return self.norm(h)  # [B, S, D]


def output_head(model: TransformerDecoder) -> tuple[Tensor, Tensor | None]:
    """Weight [V, D] and bias [V] (or None) of the linear map that ``model``'s output head computes.

    Understands a plain ``nn.Linear``, torchtune's ``TiedLinear``, and LoRA, QLoRA and DoRA heads. For an adapter
    the weight is computed, W + (alpha / rank) B A (DoRA: with its magnitude), and stays connected to the graph,
    so that a gradient of the weight reaches the adapter's matrices.

    Under FSDP2, call it where the head's parameters are gathered: inside the forward of the root module.

    Raises:
        ValueError: for any other kind of head, also a subclass with a forward of its own, which may quantise the weight
            first (``FakeQuantizedLinear``, ``QATLoRALinear``), or an adapter with dropout (no single weight exists
            then).
    """
    head = model.output
    if isinstance(head, TiedLinear) and type(head).__call__ is TiedLinear.__call__:
        return head.tied_module.weight, None
    forward = getattr(type(head), "forward", None)  # that of FSDP2's subclasses is the layer's own
    if forward in (LoRALinear.forward, DoRALinear.forward):
        return _adapted_weight(head), head.bias
    if forward is nn.Linear.forward:
        return head.weight, head.bias
    raise ValueError(
        "Expected an output head that computes what nn.Linear, TiedLinear, LoRALinear or DoRALinear do, got "
        f"{type(head).__name__}: choose a model builder whose `output` is one of these, and leave the head out of "
        "quantisation-aware training."
    )


def _adapted_weight(head: LoRALinear | DoRALinear) -> Tensor:
    if isinstance(head.dropout, nn.Dropout) and head.dropout.p > 0:
        raise ValueError(
            f"Expected lora_dropout=0.0 together with apply_lora_to_output=True, got {head.dropout.p}: "
            "set `model.lora_dropout: 0.0` or `model.apply_lora_to_output: False`."
        )
    a, b = head.lora_a.weight, head.lora_b.weight  # [R, D], [V, R]
    base = head.weight.to(a.dtype)  # dequantises an NF4 base
    if head.disabled:
        return base
    if isinstance(head, LoRALinear):
        return base + (head.alpha / head.rank) * (b @ a)
    direction = base + head.scaling * (b @ a)
    norm = torch.linalg.norm(direction.detach(), dim=1, keepdim=True)  # [V, 1], constant as in the DoRA paper
    return head.magnitude.unsqueeze(1) / norm.to(direction.dtype) * direction
