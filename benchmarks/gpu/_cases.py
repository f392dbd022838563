"""The cases of the kernels' grid, and their inputs.

Legend: N tokens, V vocabulary, D hidden width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._formulas import IGNORE

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
WIDTHS = (64, 128)  # D of student and teacher in the cases from hidden states


class Case(NamedTuple):
    """One call of a divergence."""

    vocab: int
    tokens: int
    temperature: float
    kd_ratio: float
    labels: str  # which are valid: all, some, none
    dtypes: tuple[torch.dtype, torch.dtype]  # student's and teacher's
    kind: str = "normal"

    @property
    def name(self) -> str:
        student, teacher = (str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        dtypes = student if student == teacher else f"{student} and {teacher}"
        shape = f"N={self.tokens} V={self.vocab} T={self.temperature:g}"
        return f"{shape} kd_ratio={self.kd_ratio:g}, {self.labels} valid, {dtypes}, {self.kind}"

    @property
    def small(self) -> "Case":
        """The same on a CPU, where an interpreter runs the kernels."""
        return self._replace(vocab=min(self.vocab, 300 + self.vocab % 16), tokens=min(self.tokens, 4))

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk of ``linear_kd_loss``: three chunks, the last one shorter."""
        return max(1, self.tokens * 3 // 8)


_BF16, _F16, _F32 = (BF16, BF16), (F16, F16), (F32, F32)
CASES = (
    # Llama 3 and Qwen 2.5, the vocabularies of the shipped configs
    Case(128256, 129, 1.0, 0.5, "some", _BF16),
    Case(128256, 3, 2.0, 0.5, "all", _BF16, "close"),
    Case(151936, 3, 2.0, 1.0, "some", _BF16),
    # a multiple of no power of two: narrow loads, a masked tail
    Case(50257, 3, 2.0, 0.5, "all", _BF16),
    Case(50257, 3, 1.0, 1.0, "all", _F32, "strided"),
    # every dtype, and two at once
    Case(4096, 129, 0.5, 0.3, "some", _F16),
    Case(4096, 3, 8.0, 0.3, "all", _F32),
    Case(1000, 3, 2.0, 0.3, "all", (F32, BF16)),
    # ids at -inf in both models, logits of 0 and ±1e4
    Case(4096, 3, 2.0, 1.0, "all", _BF16, "masked"),
    Case(1000, 3, 1.0, 0.3, "all", _BF16, "huge"),
    # cross-entropy alone
    Case(1000, 129, 1.0, 0.0, "some", _BF16),
    # no valid token, no token, one token, one id, fewer ids than a block
    Case(1000, 3, 2.0, 0.3, "none", _F32),
    Case(1000, 0, 1.0, 0.5, "all", _F32),
    Case(1000, 1, 2.0, 0.3, "all", _BF16),
    Case(1, 3, 2.0, 0.5, "all", _BF16),
    Case(7, 129, 2.0, 0.5, "some", _F32, "close"),
    Case(7, 3, 1.0, 1.0, "all", _BF16, "strided"),
)


def masked_ids(vocab: int) -> slice:
    """The ids that the kind "masked" masks."""
    return slice(vocab // 3, vocab // 2)


def without_masked(case: Case, labels: Tensor, *logits: Tensor) -> list[Tensor]:
    """Return logits and labels as if the masked ids did not exist, which is what -inf means."""
    if case.kind != "masked":
        return [*logits, labels]
    gap = masked_ids(case.vocab)
    keep = torch.ones(case.vocab, dtype=torch.bool, device=labels.device)
    keep[gap] = False
    moved = labels.where(labels < gap.start, labels - (gap.stop - gap.start)).where(labels >= 0, IGNORE)
    return [*(z[:, keep] for z in logits), moved]


def make_labels(case: Case, device: str) -> Tensor:
    """``[N]``; a valid one has a probability."""
    out = torch.randint(0, case.vocab, (case.tokens,), device=device)
    if case.kind == "masked":
        gap = masked_ids(case.vocab)
        out = out.where((out < gap.start) | (out >= gap.stop), 0)
    if case.labels == "none":
        out[:] = IGNORE
    elif case.labels == "some":
        out[torch.arange(case.tokens, device=device) % 3 != 1] = IGNORE
    return out


def make_logits(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Return student and teacher logits ``[N, V]``."""
    shape = (case.tokens, 2 * case.vocab if case.kind == "strided" else case.vocab)
    student, teacher = (2 * torch.randn(shape, device=device) for _ in range(2))
    if case.kind == "close":
        teacher = student + 0.05 * torch.randn(shape, device=device)
    if case.kind == "huge":
        student, teacher = (torch.randint(-1, 2, shape, device=device) * 1e4 for _ in range(2))
    student, teacher = student.to(case.dtypes[0]), teacher.to(case.dtypes[1])
    if case.kind == "strided":
        student, teacher = student[:, ::2], teacher[:, ::2]
    if case.kind == "masked":
        student[:, masked_ids(case.vocab)] = teacher[:, masked_ids(case.vocab)] = -torch.inf
    return student, teacher


class Factors(NamedTuple):
    """Hidden states ``[N, D]``, heads ``[V, D]`` and biases ``[V]`` of both models."""

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor

    def logits(self) -> tuple[Tensor, Tensor]:
        """Return both models' logits ``[N, V]`` by plain linear layers, in the models' dtypes."""
        linear = torch.nn.functional.linear
        return (
            linear(self.student_hidden, self.student_weight, self.student_bias).detach(),
            linear(self.teacher_hidden, self.teacher_weight, self.teacher_bias),
        )


def make_factors(case: Case, device: str) -> Factors:
    """Return inputs whose logits are those of the case's kind.

    Hidden states and heads are multiples of 1/8: their products are exact and so are the sums in fp32, in whatever
    order, which leaves one rounding, the same in every matrix product.
    """

    def eighths(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).mul(4).round() / 8

    (student_width, teacher_width), doubled = WIDTHS, 2 if case.kind == "strided" else 1
    hidden, weight = (eighths(rows, student_width * doubled) for rows in (case.tokens, case.vocab))
    teacher_hidden, teacher_weight = (eighths(rows, teacher_width * doubled) for rows in (case.tokens, case.vocab))
    if case.kind == "close":
        teacher_hidden, teacher_weight = hidden + eighths(*hidden.shape) / 32, weight
    if case.kind == "huge":  # each token picks one column of the head
        picked = torch.eye(student_width, device=device)
        hidden, teacher_hidden = (picked[torch.randint(len(picked), (case.tokens,))] for _ in range(2))
        weight, teacher_weight = (torch.randint(-1, 2, weight.shape, device=device) * 1e4 for _ in range(2))
    bias = torch.zeros(case.vocab, device=device)
    if case.kind == "masked":
        bias[masked_ids(case.vocab)] = -torch.inf
    made = []
    for index, tensor in enumerate((hidden, weight, bias, teacher_hidden, teacher_weight, bias)):
        tensor = tensor.to(case.dtypes[index // 3], copy=True)
        made.append(tensor[:, ::2] if case.kind == "strided" and tensor.dim() == 2 else tensor)
    return Factors(*made)
