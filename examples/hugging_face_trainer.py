"""Distil one Hugging Face model into another with a `Trainer` subclass: `python examples/hugging_face_trainer.py`.

Needs `pip install transformers accelerate`; written for transformers 5. Both models are tiny Llamas with random
weights, so that nothing is downloaded: put `from_pretrained` in their place. Legend: B sequences, S tokens of each,
V vocabulary, D hidden width.
"""

import argparse
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from torchtune_kd.kernels import linear_kd_loss

VOCAB = 512
IGNORED = -100


class DistillationTrainer(Trainer):
    """Trains `model` on its labels and on the next-token distributions of `teacher`.

    The loss starts from hidden states, so neither model's logits ``[B, S, V]`` are ever made. That needs the whole
    output head in each process: one process, or DDP. Where FSDP or ZeRO-3 shards the head, take the logits of both
    models and call ``softmax_kd_loss``. Do the same for heads that are more than a linear layer, with a soft cap, a
    scale or an adapter: the first batch compares both models' logits with those that the loss is computed from.

    Args:
        teacher (PreTrainedModel): scores the same token ids.
        kd_settings (dict | None): keyword arguments of ``linear_kd_loss``.
    """

    def __init__(
        self, *args: Any, teacher: PreTrainedModel, kd_settings: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.kd_settings = kd_settings or {}
        self.heads_are_checked = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]  # position i predicts token i + 1
        unwrapped = self.accelerator.unwrap_model(model)
        if not self.heads_are_checked:
            for name, one in (("student", unwrapped), ("teacher", self.teacher)):
                rounded = self.args.bf16 or self.args.fp16 or one.dtype != torch.float32
                check_output_head(one, name, inputs["input_ids"], tolerance=0.02 if rounded else 1e-4)
            self.heads_are_checked = True
        hidden, outputs = last_hidden(model, inputs)
        with torch.no_grad():
            teacher_hidden, _ = last_hidden(self.teacher, inputs)
        weight, bias = output_head(unwrapped)
        teacher_weight, teacher_bias = output_head(self.teacher)
        loss = linear_kd_loss(
            hidden[:, :-1],
            weight,
            teacher_hidden[:, :-1],
            teacher_weight,
            labels,
            student_bias=bias,
            teacher_bias=teacher_bias,
            reduction="mean" if num_items_in_batch is None else "sum",
            **self.kd_settings,
        )
        if num_items_in_batch is not None:
            # Valid tokens of all microbatches of this step, and (average_tokens_across_devices) of all processes, over
            # which DDP then takes a mean. The Trainer does not divide again: it sees that the model takes this count.
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def last_hidden(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """Return what the output head would be given ``[B, S, D]``.

    The model is called as a whole, so that DDP sees the call; the logits of the last position alone are made.
    """
    outputs = model(**inputs, output_hidden_states=True, logits_to_keep=1, use_cache=False)
    return outputs.hidden_states[-1], outputs


def output_head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Return the weight ``[V, D]`` and bias ``[V]`` from which the loss computes the model's logits."""
    head = model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)


@torch.no_grad()
def check_output_head(model: PreTrainedModel, name: str, tokens: Tensor, tolerance: float) -> None:
    """Compare the model's own logits with those of :func:`output_head`, on a few of the tokens ``[B, S]``.

    They may differ by ``tolerance`` times the largest.

    Raises:
        ValueError: if they differ, or if the head trains other parameters than its weight and bias.
    """
    head = model.get_output_embeddings()
    weight, bias = output_head(model)
    advice = "take the logits of both models and call softmax_kd_loss instead."
    # an adapter changes no logit before its first step
    if any(p.requires_grad and p is not weight and p is not bias for p in head.parameters()):
        raise ValueError(
            f"Expected the output head of the {name} to train a weight and a bias alone, but {type(head).__name__} "
            f"trains other parameters, of which the loss would know nothing: train no adapter on the head, or {advice}"
        )
    modes = [(module, module.training) for module in model.modules()]
    # Scaled until the largest logit is 100, where a soft cap shows; eager, so that no compiled graph keeps the hook.
    scale = torch.ones((), device=tokens.device)
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * scale.to(inputs[0].dtype), *inputs[1:]))
    try:
        model.eval()
        with torch.compiler.set_stance("force_eager"):
            for _ in range(2):
                outputs = model(input_ids=tokens[:1, :8], output_hidden_states=True, use_cache=False)
                hidden = outputs.hidden_states[-1]
                ours = F.linear(hidden * scale.to(hidden.dtype), weight, bias).float()
                difference, largest = (outputs.logits - ours).abs().max(), ours.abs().max()
                if not difference <= tolerance * largest:
                    raise ValueError(
                        f"Expected the logits of the {name} to be its last hidden states times the weight of its "
                        f"output head (plus its bias), but they differ by {difference:.2g} where the largest is "
                        f"{largest:.2g}, as with a soft cap, a scale or an adapter on the head: {advice}"
                    )
                scale = 100 / largest.clamp(min=0.01)  # of an untrained head all may be 0
    finally:
        hook.remove()
        for module, training in modes:
            module.training = training


def tiny_llama(width: int, layers: int, spread: float = 0.02) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=spread,
    )
    return LlamaForCausalLM(config)


def tiny_dataset(sequences: int = 16, length: int = 24) -> list[dict[str, Tensor]]:
    """Random tokens; the labels of a prompt, of another length in each sequence, are ignored."""
    rows = []
    for i in range(sequences):
        tokens = torch.randint(VOCAB, (length,))
        labels = tokens.clone()
        labels[: 1 + i % (length // 2)] = IGNORED
        rows.append({"input_ids": tokens, "labels": labels})
    return rows


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--use-cpu", action="store_true", help="even where there is a GPU")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            model=tiny_llama(width=64, layers=1),
            teacher=tiny_llama(width=128, layers=2, spread=0.2),
            kd_settings={"divergence": "forward_kl", "temperature": 2.0, "kd_ratio": 0.9},
            args=TrainingArguments(
                folder,
                max_steps=args.steps,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                logging_steps=max(1, args.steps // 10),
                save_strategy="no",
                report_to="none",
                use_cpu=args.use_cpu,
            ),
            train_dataset=tiny_dataset(),
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
