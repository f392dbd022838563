"""One side of ``benchmarks.losses --llama`` in a process of its own: compute the objective once, write what it took.

Every side starts from the last hidden states of both models and ends with the gradient of the student's. The heads
are frozen, as a LoRA student's is. Legend: N tokens, V vocabulary, D hidden width.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .._measure import measure

KD_RATIO = 0.5
CHUNKS = 8
IGNORE = -100


def heads(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits ``[1, N, V]`` of both models, as torchtune's decoder gives them without chunks: in fp32."""
    student = F.linear(inputs["student_hidden"], inputs["student_weight"]).float()
    with torch.no_grad():
        teacher = F.linear(inputs["teacher_hidden"], inputs["teacher_weight"]).float()
    return student, teacher


def chunked_heads(inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Lists of logits ``[1, N/8, V]``, as torchtune's decoder gives them in chunks: in the models' dtype."""
    student = [F.linear(h, inputs["student_weight"]) for h in inputs["student_hidden"].chunk(CHUNKS, dim=1)]
    with torch.no_grad():
        teacher = [F.linear(h, inputs["teacher_weight"]) for h in inputs["teacher_hidden"].chunk(CHUNKS, dim=1)]
    return student, teacher


def mix(class_loss: Tensor, kd_loss: Tensor) -> Tensor:
    """The sum the stock recipe backpropagates."""
    return (1 - KD_RATIO) * class_loss + KD_RATIO * kd_loss


def stock(inputs: dict[str, Tensor]) -> Tensor:
    from torchtune.modules.loss import ForwardKLLoss

    student, teacher = (logits.flatten(0, 1) for logits in heads(inputs))
    labels = inputs["labels"].flatten()
    class_loss = F.cross_entropy(student, labels, ignore_index=IGNORE)
    return mix(class_loss, ForwardKLLoss()(student, teacher, labels))


def stock_chunked(inputs: dict[str, Tensor]) -> Tensor:
    from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss

    student, teacher = chunked_heads(inputs)
    kd_loss = ForwardKLWithChunkedOutputLoss(CHUNKS)(student, teacher, inputs["labels"])
    return mix(CEWithChunkedOutputLoss(CHUNKS)(student, inputs["labels"]), kd_loss)


def our_module(inputs: dict[str, Tensor]) -> Tensor:
    """Our loss in the place of torchtune's; the cross-entropy is still the stock one."""
    from torchtune_kd.losses import ForwardKLLoss

    student, teacher = (logits.flatten(0, 1) for logits in heads(inputs))
    labels = inputs["labels"].flatten()
    class_loss = F.cross_entropy(student, labels, ignore_index=IGNORE)
    return mix(class_loss, ForwardKLLoss()(student, teacher, labels))


def our_softmax(inputs: dict[str, Tensor]) -> Tensor:
    from torchtune_kd.kernels import softmax_kd_loss

    student = F.linear(inputs["student_hidden"], inputs["student_weight"])
    with torch.no_grad():
        teacher = F.linear(inputs["teacher_hidden"], inputs["teacher_weight"])
    return softmax_kd_loss(student, teacher, inputs["labels"], kd_ratio=KD_RATIO)


def our_linear(inputs: dict[str, Tensor]) -> Tensor:
    from torchtune_kd.kernels import linear_kd_loss

    return linear_kd_loss(
        inputs["student_hidden"],
        inputs["student_weight"],
        inputs["teacher_hidden"],
        inputs["teacher_weight"],
        inputs["labels"],
        kd_ratio=KD_RATIO,
    )


# Name -> what it computes; the first two are what the others are compared with.
SIDES = {
    "stock": stock,
    "stock_chunked": stock_chunked,
    "our_module": our_module,
    "our_softmax": our_softmax,
    "our_linear": our_linear,
}


def first_tokens(inputs: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """The same heads over the first n tokens."""
    per_token = ("student_hidden", "teacher_hidden", "labels")
    return {name: t[:, :n] if name in per_token else t for name, t in inputs.items()}


def run(side: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the student's hidden states ``[1, N, D]``."""
    hidden = inputs["student_hidden"].detach().requires_grad_()
    loss = SIDES[side]({**inputs, "student_hidden": hidden})
    loss.backward()
    return loss.detach(), hidden.grad


def main(side: str, inputs_file: str, output_file: str) -> None:
    inputs = torch.load(inputs_file)
    truth = inputs.pop("truth")
    # On a few tokens: loads the code of all operations, and is compared with fp64.
    loss, grad = run(side, first_tokens(inputs, truth["n_tokens"]))
    # torchtune's forward KL is a cross-entropy, larger by the teacher's entropy
    right = truth["loss"] + (KD_RATIO * truth["teacher_entropy"] if side.startswith("stock") else 0.0)
    cost = measure(lambda: run(side, inputs))
    result = {
        **cost._asdict(),
        "loss_error": abs(loss.item() / right - 1),
        "gradient_error": ((grad.double() - truth["grad"]).norm() / truth["grad"].norm()).item(),
    }
    Path(output_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
