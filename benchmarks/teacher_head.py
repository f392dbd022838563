"""Measure what a teacher's head in 8-bit floats changes: its distribution, and a student's gradient.

    python -m benchmarks.teacher_head

SmolLM2-135M-Instruct in bf16 on reference prose (``pydoc_data.topics``, evenly spaced sequences). Its last hidden
states are read by the head as it is, and by the head in 8-bit floats. Where the device has no product of them it is
emulated, which differs in the order of an fp32 sum alone. KL is that of the distributions at T, in nats a token,
without T². For its scale the same stands there of logits in fp32 and those of the bf16 head, which rounds them.

The gradient is that of the forward KL, summed over all tokens, to a student's last hidden states and to all of its
weights; its change is the norm of the difference relative to the norm. Students are the same model with the layers
whose removal changes it most, before any training: one of 15 layers, as in the demo, and one of 28, which is near its
teacher and so has a small gradient for the errors to stand in. Again the change from the bf16 head to logits in fp32
stands there for its scale.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from torchtune_kd.data.prose import joined, reference_documents, split_documents
from torchtune_kd.demo.teacher import load_model
from torchtune_kd.errors import exit_with_message
from torchtune_kd.kernels import float8_weight, has_float8_product, linear_kd_loss
from torchtune_kd.models.output_head import output_head, skip_output_head
from torchtune_kd.models.smollm2 import smollm2_tokenizer
from torchtune_kd.tools import fetch_smollm2, removal_influence, select_layers, text_batches

from ._measure import describe_machine

LAYERS, TEMPERATURES, STUDENTS = 30, (1.0, 2.0), (15, 28)


class Difference(NamedTuple):
    """Hold how far a head is from another one on the same hidden states."""

    mean: float  # KL, nats a token
    largest: float
    agreement: float  # share of tokens with the same most likely next one


class Change(NamedTuple):
    """Hold how far a student is from its teacher, and what the teacher's head changes in its gradient."""

    kl: float
    hidden: float  # relative, of last hidden states
    weights: float  # relative, of all weights


def difference(hidden: Tensor, weight: Tensor, others: tuple, temperature: float) -> Difference:
    """Compare the head `weight` on ``hidden`` ``[N, D]`` with ``others``, hidden states and head of the other side."""
    settings = {"temperature": temperature, "scale_by_temperature_squared": False, "reduction": "none"}
    labels = torch.zeros(len(hidden), dtype=torch.int64)
    with torch.no_grad():
        kl, metrics = linear_kd_loss(  # reverse: from the first two's distribution to the others'
            hidden, weight, *others, labels, divergence="reverse_kl", return_metrics=["top1_agreement"], **settings
        )
    return Difference(kl.mean().item(), kl.max().item(), metrics["top1_agreement"].item() / len(hidden))


def changes(student: TransformerDecoder, tokens: Tensor, sides: Sequence[tuple], temperature: float) -> list[Change]:
    """Compare the gradients that all ``sides`` but the first give with those of the first.

    Args:
        student (TransformerDecoder): whose gradients they are; skips its head.
        tokens (Tensor): ``[B, S]``.
        sides (Sequence[tuple]): each a teacher's last hidden states ``[B, S, D]`` and its head.
        temperature (float): T.
    """
    student.requires_grad_(True)
    weights = list(student.parameters())
    hidden = student(tokens)
    labels = torch.zeros(tokens.shape, dtype=torch.int64)
    found: list[Change] = []
    first: list[list[Tensor]] = []
    for side in sides:
        states, weight = hidden.detach().requires_grad_(), output_head(student)[0]
        settings = {"temperature": temperature, "reduction": "sum", "return_metrics": ["kl"]}
        loss, metrics = linear_kd_loss(states, weight, *side, labels, **settings)
        by_states, by_head = torch.autograd.grad(loss, [states, weight])
        grads = torch.autograd.grad(hidden, weights, by_states, retain_graph=True, materialize_grads=True)
        grads = [g + by_head if w is weight else g for w, g in zip(weights, grads, strict=True)]
        if not first:
            first = [[by_states], grads]
            kl = (metrics["kl"] / metrics["num_tokens"]).item()
        else:
            found.append(Change(kl, _relative(first[0], [by_states]), _relative(first[1], grads)))
    return found


def _relative(before: list[Tensor], after: list[Tensor]) -> float:
    square = lambda tensors: sum(t.double().square().sum() for t in tensors)  # noqa: E731
    apart = square(a.double() - b.double() for a, b in zip(after, before, strict=True))
    return (apart / square(before)).sqrt().item()


def with_layers(model: TransformerDecoder, kept: list[int]) -> TransformerDecoder:
    """Return a copy of a model that has some of its layers."""
    student = copy.deepcopy(model)
    student.layers = nn.ModuleList(student.layers[index] for index in kept)
    return skip_output_head(student)


def report(
    model: TransformerDecoder, tokens: Tensor, calibration: list[Tensor], students: tuple[int, ...], say: Callable
) -> None:
    """Measure the heads of a model on ``tokens`` ``[B, S]`` and print two tables."""
    influence = removal_influence(model, calibration)
    kept = {count: select_layers(len(model.layers), count, "removal", influence) for count in students}
    decoders = {count: with_layers(model, layers) for count, layers in kept.items()}
    with torch.no_grad():
        states = skip_output_head(model)(tokens)
    hidden, weight = states.flatten(0, 1), output_head(model)[0].detach()
    head = float8_weight(weight)

    say(f"\n{'KL a token':42}{'mean':>12}{'max':>12}{'top-1 agreement':>18}")
    for temperature in TEMPERATURES:
        for name, first, other in (
            ("bf16 head -> float8", (hidden, weight), (hidden, head)),
            ("fp32 logits -> bf16 head", (hidden.float(), weight.float()), (hidden, weight)),
        ):
            found = difference(*first, other, temperature)
            say(f"{f'T = {temperature:g}, {name}':42}{found.mean:12.2e}{found.largest:12.2e}{found.agreement:18.2%}")

    say(f"\n{'change of the gradient':42}{'student KL':>12}{'states':>12}{'all weights':>18}")
    sides = (states, weight), (states, head), (states.float(), weight.float())
    for count, student in decoders.items():
        for temperature in TEMPERATURES:
            for to, found in zip(("float8", "fp32 logits"), changes(student, tokens, sides, temperature), strict=True):
                name = f"T = {temperature:g}, {count} layers, bf16 head -> {to}"
                say(f"{name:42}{found.kl:12.3g}{found.hidden:12.2%}{found.weights:18.2%}")


@exit_with_message()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.teacher_head", description=__doc__.split("\n\n")[0])
    parser.add_argument("--sequences", type=int, default=8, help="of text (default 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens of one (default 256)")
    args = parser.parse_args(argv)
    if args.sequences < 1 or args.length < 2:
        parser.error("expected --sequences of at least 1 and --length of at least 2")

    folder = fetch_smollm2()
    tokenizer = smollm2_tokenizer(str(folder / "tokenizer.json"))
    text = split_documents(reference_documents())
    tokens = torch.cat(
        text_batches(tokenizer, joined(text.held_out), seq_len=args.length, num_sequences=args.sequences)
    )
    calibration = text_batches(tokenizer, joined(text.train), seq_len=args.length, num_sequences=2)
    model = load_model(folder, LAYERS, torch.bfloat16)
    print(describe_machine())
    how = "emulated" if not has_float8_product(tokens.device, torch.bfloat16) else "the device's product"
    print(f"SmolLM2-135M-Instruct, bf16, {len(tokens)} x {args.length} tokens; 8-bit floats: {how}")
    report(model, tokens, calibration, STUDENTS, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
