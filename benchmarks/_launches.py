"""List what the package launches: its own calls on tensors of the meta device, and what Triton compiles each kernel by.

Legend: N tokens, V vocabulary. A case's name says what it computes.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from torchtune_kd.kernels import DIVERGENCES, METRICS, SPARSE_METRICS, Objective
from torchtune_kd.kernels._checks import runs_interpreted
from torchtune_kd.kernels._plan import Plan
from torchtune_kd.kernels._softmax import softmax_backward, softmax_forward
from torchtune_kd.kernels._teachers import CELLS, Cells
from torchtune_kd.kernels._triton import cells, rows
from torchtune_kd.kernels._triton.shards import Group, parallel_rows

VOCAB = 128256
REFUSAL = "TRITON_INTERPRET is set, so Triton interprets its kernels and compiles nothing; unset it"

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
}
DTYPES = {name: dtype for dtype, name in _TYPES.items() if dtype.is_floating_point}


class Case(NamedTuple):
    """One call of the public functions, as far as it decides on a binary."""

    divergence: str  # "" if nothing but the cross-entropy is computed
    temperature: float = 1.0
    cross_entropy: bool = False
    gradient: bool = True
    metrics: str = ""  # "all", "student": those that need no teacher, or "kl" alone
    labels: bool = True
    row_scale: bool = False  # rows with incoming gradients of their own: linear_kd_loss with a trained head, "none"
    shards: bool = False  # of rows, over several processes
    stored: bool = False  # ids of the teacher, instead of all logits
    backward: str = ""  # "scale" or "scale-rows": instead, the scaling of a stored gradient

    @property
    def words(self) -> tuple[str, ...]:
        if self.backward:
            return (self.backward,)
        words = (self.divergence, f"T={self.temperature:g}" if self.divergence else "", "ce" * self.cross_entropy)
        words += ("gradient" if self.gradient else "loss", "" if self.labels else "unlabelled")
        words += ("row-scale" * self.row_scale, f"{self.metrics}-metrics" if self.metrics else "")
        words += ("shards" * self.shards, "stored" * self.stored)
        return tuple(filter(None, words))

    @property
    def name(self) -> str:
        return " ".join(self.words)


def all_cases() -> list[Case]:
    """Every case, common ones first: each divergence, at T = 1 and another, with all that can be added to it."""
    flags = (False, True)
    everything = list(product(DIVERGENCES, (1.0, 2.0), flags, flags, ("", "all")))
    cases = [Case(*values) for values in everything]
    cases += [Case("", 1.0, True, gradient, metrics) for gradient, metrics in product(flags, ("", "student"))]
    cases += [Case(*values, labels=False) for values in everything if not values[2]]
    cases += [Case(*values, True, True, "kl") for values in product(DIVERGENCES, (1.0, 2.0))]
    cases += [Case(*values, row_scale=True) for values in everything if values[3] and not values[4]]
    cases += [Case("", 1.0, True, True, row_scale=True)]
    cases += [Case(*values, shards=True) for values in everything if values[2]]
    cases += [Case(*values, stored=True) for values in everything if values[0] == DIVERGENCES[0]]  # all alike
    return cases + [Case("", backward=word) for word in ("scale", "scale-rows")]


def common_cases() -> list[Case]:
    """Each divergence as it is trained with, and for one of two and one of three passes what else can be asked for."""
    cases = [Case(divergence, temperature, True) for divergence, temperature in product(DIVERGENCES, (1.0, 2.0))]
    for name in ("forward_kl", "jsd"):
        cases += [Case(name, 2.0, True, True, metrics) for metrics in ("kl", "all")]
        cases += [Case(name, 2.0, False), Case(name, 2.0, True, False), Case(name, 1.0, False, False)]
    return cases + [Case("forward_kl", temperature, True, stored=True) for temperature in (1.0, 2.0)]


class NoGroup(Group):
    """Stand for a group of processes that are not there."""

    def reduce(self, tensor: Tensor, operation: object) -> Tensor:
        return tensor


class Binary(NamedTuple):
    """All that Triton compiles a kernel by, besides the architecture."""

    kernel: str  # name in its module
    module: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # arguments known to be multiples of 16
    options: tuple[tuple[str, int], ...]  # what the launch gave


def binaries_of(case: Case, vocab: int = VOCAB, dtype: torch.dtype = torch.bfloat16, n_tokens: int = 4096) -> list:
    """Return those that the case launches."""
    with recorded() as binaries:
        _call(case, *(torch.empty(n_tokens, vocab, dtype=dtype, device="meta") for _ in range(2)))
    return binaries


@contextmanager
def recorded() -> Iterator[list[Binary]]:
    """List kernels in place of launching them."""
    if runs_interpreted():
        raise RuntimeError(REFUSAL)
    binaries = []

    def run(kernel: triton.JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        binaries.append(specialise(kernel, *args, **kwargs))

    with patch.object(triton.JITFunction, "run", run):
        yield binaries


def _call(case: Case, student: Tensor, teacher: Tensor) -> None:
    n_tokens = student.shape[0]
    kd_ratio = 0.0 if not case.divergence else 0.5 if case.cross_entropy else 1.0
    if case.backward:
        shape, reduction = ((n_tokens,), "none") if case.backward == "scale-rows" else ((), "mean")
        grad_loss, count = torch.empty(shape, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
        softmax_backward(student, grad_loss, count, reduction, "triton", in_place=True)
        return
    objective = Objective(case.divergence or "forward_kl", None, case.temperature, kd_ratio)
    student_metrics = ("class_loss", "student_entropy")
    every = SPARSE_METRICS if case.stored else METRICS
    metrics = {"": (), "student": student_metrics, "kl": ("kl",), "all": every}[case.metrics]
    metrics = tuple(name for name in metrics if case.labels or not name.endswith("class_loss"))
    plan = Plan(objective, metrics, student.shape[-1], "mean", bool(case.divergence), case.gradient)
    labels = torch.empty(n_tokens, dtype=torch.int64, device="meta") if case.labels else None
    teacher = teacher if plan.has_teacher else None
    row_scale = torch.empty((), device="meta")
    if case.stored:
        ids = torch.empty(n_tokens, 64, dtype=torch.int64, device="meta")
        per_token = (torch.empty(n_tokens, device="meta") for _ in range(3))
        block = cells.TritonCellsBlockLoss(plan._replace(teacher_kind=CELLS), row_scale)
        block(student, Cells(ids, ids.float(), *per_token), labels, student if case.gradient else None)
    elif case.shards:
        parallel_rows(
            student, teacher, labels, plan, student if case.gradient else None, row_scale, NoGroup(None, 0, 2)
        )
    elif case.row_scale:
        rows.rows(student, teacher, labels, plan, student, torch.empty(n_tokens, 1, device="meta"))
    else:
        softmax_forward(student, teacher, labels, plan, "triton")


def specialise(kernel: triton.JITFunction, *args: object, **kwargs: object) -> Binary:
    """Do as ``kernel[grid](*args, **kwargs)``: an integer 1 is a constant, multiples of 16 are known."""
    options = {name: kwargs.pop(name) for name in list(kwargs) if name not in kernel.arg_names}
    values = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        name, value, free = parameter.name, values[parameter.name], not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and free):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, float):
            signature[name] = "fp32"
            continue
        if isinstance(value, Tensor):
            signature[name], value = f"*{_TYPES[value.dtype]}", value.data_ptr()
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if free and not parameter.do_not_specialize_on_alignment and value % 16 == 0:
            aligned.append(name)
    parts = map(tuple, (signature.items(), constants.items(), aligned, options.items()))
    return Binary(kernel.fn.__name__, kernel.fn.__module__, *parts)
