"""Refusals of what cannot be right: second derivatives, transforms of functions, and tracing into the losses.

A gradient is computed together with its loss and is a plain tensor afterwards, from which no graph leads back to the
inputs. Whatever differentiated it again would take it for a constant, and be wrong without a word.
"""

import torch
from torch import Tensor
from torch.utils import _python_dispatch

_TWICE = (
    "the gradient of a distillation loss cannot be differentiated: it was computed with the loss, and no graph leads "
    "from it to its inputs; for second derivatives (a gradient penalty, a Hessian) write the loss in PyTorch operations"
)
_TWICE_COMPILED = (
    "create_graph=True has no use for a compiled distillation loss, whose gradient cannot be differentiated; leave it "
    "out, or for second derivatives (a gradient penalty, a Hessian) write the loss in PyTorch operations"
)
_FORWARD = "forward-mode differentiation cannot go through a distillation loss; use loss.backward()"
_TRANSFORMED = (
    "torch.func's transforms (grad, vmap, jvp, ...) and is_grads_batched cannot go through a distillation loss; "
    "use loss.backward() or torch.autograd.grad"
)
_TRACED = (
    "make_fx and aot_function would record the steps of one call of a distillation loss; use torch.compile or "
    "torch.export, which keep the loss as one operator"
)

# Names of PyTorch that it does not document; where one is missing, PyTorch's own refusal is less clear.
_transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_is_batch = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", lambda tensor: False)
_dispatch_modes = getattr(_python_dispatch, "_get_current_dispatch_mode_stack", list)
_current_node = getattr(torch._C, "_current_autograd_node", lambda: None)
_TRACERS = ("ProxyTorchDispatchMode", "FunctionalTensorMode")


def check_transforms() -> None:
    """Refuse a call inside a transform of ``torch.func``, inside forward-mode differentiation of a compiled function,
    and inside a tracer that would record single steps.

    Raises:
        ValueError: in one sentence.
    """
    refuse_transforms()
    if torch.compiler.is_compiling():
        # a graph drops tangents, so that they would be 0; eagerly the autograd Functions see them
        if getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0:
            raise ValueError(_FORWARD)
        return
    if is_traced():
        raise ValueError(_TRACED)


def is_traced() -> bool:
    """Return whether a tracer records the operations that run, as that of ahead-of-time autograd does."""
    return any(type(mode).__name__ in _TRACERS for mode in _dispatch_modes())


def refuse_transforms(grad_loss: Tensor | None = None) -> None:
    """Refuse a call inside a transform of ``torch.func``, or a backward pass with a batch of incoming gradients."""
    if _transforms_are_active() or (grad_loss is not None and _is_batch(grad_loss)):
        raise ValueError(_TRANSFORMED)


def refuse_tangents(ctx: object, *grad_inputs: object) -> None:
    """Refuse inputs with tangents, as ``jvp`` of the autograd Functions."""
    raise ValueError(_FORWARD)


def anchor(*inputs: Tensor | None) -> Tensor | None:
    """Return an empty tensor on the graphs of those inputs that require grad; it holds none of their memory."""
    parts = [tensor[:0].flatten() for tensor in inputs if tensor is not None and tensor.requires_grad]
    return torch.cat(parts) if parts else None


def on_graph_of(
    grads: tuple[Tensor | None, ...], grad_loss: Tensor, inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return gradients that may be used, but whose differentiation is an error, if a graph of them is being made.

    Args:
        grads (tuple[Tensor | None, ...]): of the inputs.
        grad_loss (Tensor): the incoming gradient, which they depend on as well.
        inputs (Tensor | None): what :func:`anchor` returned.
    """
    if not torch.is_grad_enabled():  # backward without create_graph
        return grads
    given = [grad for grad in grads if grad is not None]
    if not given:
        return grads
    connected = iter(_Once.apply(len(given), *given, grad_loss, inputs))
    return tuple(None if grad is None else next(connected) for grad in grads)


def refuse_graph_of_gradients() -> None:
    """Refuse ``create_graph=True`` in the backward pass that runs, from an operator of a compiled graph.

    Ahead-of-time autograd runs such a graph with gradients switched off, and connects what leaves it with those inputs
    only that it has saved. A hook of the node that runs the graph sees whether gradients are on around it.
    """
    node = _current_node()
    if node is None:
        return

    def look(*_: object) -> None:
        handle.remove()
        if torch.is_grad_enabled():
            raise RuntimeError(_TWICE_COMPILED)

    handle = node.register_hook(look)


class _Once(torch.autograd.Function):
    """Hand the first tensors on unchanged, on the graphs of all."""

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_TWICE)
