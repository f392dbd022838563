"""The kernels on CUDA tensors against the formulas in fp64, and what has to be equal to the bit.

Legend: N tokens, V vocabulary.
"""

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor

from ..losses._report import markdown_table
from ._cases import BF16, CASES, F16, F32, Case, make_factors, make_labels, make_logits, without_masked
from ._formulas import DIVERGENCES, IGNORE, mean_objective
from ._job import Clock, Emit, Job, Row, Skip

TITLE = "The kernels against fp64, and to the bit"
PARTS = (*DIVERGENCES, "more")
ROUNDING = {F32: 4e-6, F16: 1e-3, BF16: 8e-3}  # one rounding of a gradient in the student's dtype
Share = float  # an error over what is allowed: at most 1 where a check holds


def run(job: Job, emit: Emit) -> None:
    """Run the checks of one divergence, or of ``more``, until the time is up; a row for each."""
    from ._more import checks as more_checks

    backend, why = backend_of(job)
    if why:
        emit({"what": "Triton", "of": "more", "case": job.part, "left_out": f"{why}; PyTorch's backend is checked"})
    poison_unwritten_memory()
    clock = Clock(job.seconds)
    checks = more_checks(job, backend) if job.part == "more" else _checks(job, backend)
    for what, case, check in checks:
        row = {"what": what, "of": job.part, "case": case}
        if clock.left() <= 0:
            emit(row | {"left_out": "the time was up"})
            continue
        torch.manual_seed(0)
        try:
            share = check()
            ended = {"share": share} if math.isfinite(share) else {"error": "differs, or is not a number"}
            emit(row | {"ok": share <= 1} | ended)
        except Skip as reason:
            emit(row | {"left_out": str(reason)})
        except Exception as error:
            emit(row | {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def backend_of(job: Job) -> tuple[str, str]:
    """Return the backend to check, and why it is not Triton's, which happens in a rehearsal alone."""
    if importlib.util.find_spec("triton") is None:
        if job.device == "cuda":
            raise Skip("Triton is not installed")
        return "torch", "Triton is not installed"
    if job.device == "cpu":
        from torchtune_kd.kernels import softmax_kd_loss

        try:
            softmax_kd_loss(torch.zeros(1, 2), torch.zeros(1, 2), backend="triton")
        except Exception as error:  # some versions of Triton do not get on with some of NumPy
            return "torch", f"its interpreter fails here, {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "triton", ""


def poison_unwritten_memory() -> None:
    """Let ``torch.empty`` give NaN, so that an element that is never written fails its check."""
    warnings.filterwarnings("ignore", message=".*deterministic.*")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if not torch.empty(9).isnan().all():
        raise RuntimeError("torch.empty is not poisoned under deterministic algorithms in this PyTorch")


def _checks(job: Job, backend: str) -> Iterable[tuple[str, str, Callable[[], Share]]]:
    device, divergence = job.device, job.part
    for vocab in (128256, 50257, 4096):
        for dtype in (BF16, F32):
            case = Case(vocab, 33, 2.0, 1.0, "some", (dtype, dtype))
            case = case.small if job.rehearse else case
            yield "equal models", case.name, lambda case=case: check_equal(divergence, case, device, backend)
    # Multiples of 64, to which linear_kd_loss pads its rows: both functions then launch one and the same binary.
    for vocab, dtype in ((4096, BF16), (1088, F32)):
        case = Case(vocab, 129, 2.0, 0.5, "some", (dtype, dtype))
        case = case.small._replace(vocab=320) if job.rehearse else case
        yield "in place", case.name, lambda case=case: check_in_place(divergence, case, device, backend)
    repeated, repeats = Case(128256, 300, 2.0, 0.5, "some", (BF16, BF16)), 20
    if job.rehearse:
        repeated, repeats = repeated.small, 3
    name = f"{repeats} repeats"
    yield name, repeated.name, lambda: check_repeats(divergence, repeated, repeats, device, backend)
    cases = CASES
    if job.rehearse:  # a third for each divergence, all of them together
        cases = [case.small for case in CASES[DIVERGENCES.index(divergence) % 3 :: 3]]
    for index, case in enumerate(cases):
        yield "logits", case.name, lambda case=case: check_logits(divergence, case, device, backend)
        trained = index % 2 == 0
        name = f"{case.name}, {'trainable' if trained else 'frozen'} head"
        yield "hidden states", name, lambda c=case, t=trained: check_hidden(divergence, c, t, device, backend)


def _settings(divergence: str, case: Case, backend: str) -> dict[str, Any]:
    settings = {"divergence": divergence, "temperature": case.temperature, "kd_ratio": case.kd_ratio}
    return settings | {"backend": backend}


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs, materialize_grads=True))


def largest(tensor: Tensor) -> float:
    return tensor.double().abs().max().item() if tensor.numel() else 0.0


def share(error: float, allowed: float) -> Share:
    """Return ``error / allowed``; infinite where the error is not a number."""
    return error / allowed if error == error else float("inf")


def exactly(good: bool) -> Share:
    return 0.0 if good else float("inf")


def _reference(case: Case, divergence: str, student: Tensor, teacher: Tensor, labels: Tensor, dtype: torch.dtype):
    """Return loss and gradient of the formula in ``dtype``, as fp64."""
    leaf = student.detach().to(dtype).requires_grad_()
    z, t, y = without_masked(case, labels, leaf, teacher.to(dtype))[:3]
    loss = mean_objective(z, t, y, divergence, case.temperature, case.kd_ratio)
    return loss.detach().double(), gradients(loss, leaf)[0].double()


def check_logits(divergence: str, case: Case, device: str, backend: str) -> Share:
    """``softmax_kd_loss`` against the formula in fp64, in value and gradient."""
    from torchtune_kd.kernels import softmax_kd_loss

    student, teacher = make_logits(case, device)
    labels = make_labels(case, device)
    truth, right = _reference(case, divergence, student, teacher, labels, torch.float64)
    plain, plain_grad = _reference(case, divergence, student, teacher, labels, torch.float32)
    student.requires_grad_()
    loss = softmax_kd_loss(student, teacher, labels, **_settings(divergence, case, backend))
    (grad,) = gradients(loss, student)
    if loss.dtype != torch.float32 or grad.dtype != student.dtype or loss < 0:
        return float("inf")
    rounding = ROUNDING[case.dtypes[0]] * largest(right)
    return max(
        share(largest(loss - truth), largest(plain - truth) + 2e-6 * max(1.0, truth.item())),
        share(largest(grad.double() - right), largest(plain_grad - right) + rounding + 1e-9),
    )


def check_hidden(divergence: str, case: Case, trained: bool, device: str, backend: str) -> Share:
    """``linear_kd_loss`` against the formula in fp64, in value and gradients, in chunks."""
    from torchtune_kd.kernels import linear_kd_loss

    factors, labels = make_factors(case, device), make_labels(case, device)
    student, teacher = factors.logits()  # as the models round them
    truth, g = _reference(case, divergence, student, teacher, labels, torch.float64)
    plain, plain_g = _reference(case, divergence, student, teacher, labels, torch.float32)
    names = ("student_hidden", "student_weight", "student_bias") if trained else ("student_hidden",)
    for name in names:
        getattr(factors, name).requires_grad_()
    settings = _settings(divergence, case, backend)
    loss = linear_kd_loss(**factors._asdict(), labels=labels, chunk_tokens=case.chunk_tokens, **settings)
    found = gradients(loss, *(getattr(factors, name) for name in names))

    dtype = case.dtypes[0]
    unit = ROUNDING[dtype]
    slack = (plain_g - g).abs() + unit * g.abs()  # of one rounding of a logit's gradient
    if dtype == F16:  # its smallest number, times the tokens by which the stored gradient is divided later
        slack += 6e-8 / max(1, int((labels != IGNORE).sum()))
    if divergence == "tvd":  # its gradient jumps where p = q, and there fp32 does not know the side
        p, q = (torch.softmax(z.double() / case.temperature, -1) for z in (teacher, student))
        slack += torch.where((p - q).abs() < 1e-6 * q, case.temperature * q, 0.0)
    hidden, weight = factors.student_hidden.detach().double(), factors.student_weight.detach().double()
    expected = (
        (g @ weight, slack @ weight.abs()),
        (g.t() @ hidden, slack.t() @ hidden.abs()),
        (g.sum(0), slack.sum(0)),
    )
    shares = [share(largest(loss - truth), largest(plain - truth) + 2e-6 * max(1.0, truth.item()))]
    for grad, (right, bound) in zip(found, expected, strict=False):
        allowed = (bound + unit * right.abs()).norm() + 1e-9
        shares.append(share((grad.double() - right).norm().item(), allowed.item()))
    return max(shares) if loss >= 0 else float("inf")


def check_equal(divergence: str, case: Case, device: str, backend: str) -> Share:
    """Check that equal models give a divergence and a gradient of exactly 0, from logits and from hidden states."""
    from torchtune_kd.kernels import linear_kd_loss, softmax_kd_loss

    settings = _settings(divergence, case, backend)
    student, _ = make_logits(case, device)
    labels = make_labels(case, device)
    loss = softmax_kd_loss(student.requires_grad_(), student.detach().clone(), labels, **settings)
    (grad,) = gradients(loss, student)
    factors = make_factors(case, device)
    hidden, weight = factors.student_hidden.requires_grad_(), factors.student_weight
    linear = linear_kd_loss(
        hidden, weight, hidden.detach().clone(), weight, labels, chunk_tokens=case.chunk_tokens, **settings
    )
    (linear_grad,) = gradients(linear, hidden)
    zero = loss == 0 and linear == 0 and not grad.any() and not linear_grad.any()
    return exactly(bool(zero))


def check_in_place(divergence: str, case: Case, device: str, backend: str) -> Share:
    """``linear_kd_loss`` overwrites logits by their gradient, ``softmax_kd_loss`` does not.

    With the identity for a head its logits are the hidden states and its gradient is that of the logits, so that both
    have to agree to the bit, in every token's loss and in the gradient.
    """
    from torchtune_kd.kernels import linear_kd_loss, softmax_kd_loss

    student, teacher = make_logits(case, device)
    labels, head = make_labels(case, device), torch.eye(case.vocab, device=device, dtype=case.dtypes[0])
    settings = _settings(divergence, case, backend) | {"reduction": "none"}
    apart, together = student.detach().clone().requires_grad_(), student.detach().clone().requires_grad_()
    losses = softmax_kd_loss(apart, teacher, labels, **settings)
    in_place = linear_kd_loss(together, head, teacher, head, labels, chunk_tokens=case.chunk_tokens, **settings)
    (grad,), (also,) = gradients(losses.sum(), apart), gradients(in_place.sum(), together)
    return exactly(torch.equal(losses, in_place) and torch.equal(grad, also))


def check_repeats(divergence: str, case: Case, repeats: int, device: str, backend: str) -> Share:
    """Repeated calls on the same inputs give the same bits."""
    from torchtune_kd.kernels import linear_kd_loss, softmax_kd_loss

    settings = _settings(divergence, case, backend)
    student, teacher = make_logits(case, device)
    factors, labels = make_factors(case, device), make_labels(case, device)
    student.requires_grad_(), factors.student_hidden.requires_grad_(), factors.student_weight.requires_grad_()

    def call() -> list[Tensor]:
        loss = softmax_kd_loss(student, teacher, labels, **settings)
        linear = linear_kd_loss(**factors._asdict(), labels=labels, chunk_tokens=case.chunk_tokens, **settings)
        grads = gradients(linear, factors.student_hidden, factors.student_weight)
        return [loss.detach(), *gradients(loss, student), linear.detach(), *grads]

    first = call()
    return exactly(all(all(map(torch.equal, first, call())) for _ in range(repeats - 1)))


# ------------------------------------------------------------------------------------------------- report


def problems(rows: list[Row]) -> list[str]:
    """Return a line for each check that does not hold."""
    found = []
    for row in rows:
        if row.get("ok") is False:
            why = row.get("error") or f"{row['share']:.3g} of what is allowed"
            found.append(f"{row['of']}, {row['what']}: {row['case']}: {why}")
    return found


def render(rows: list[Row], facts: dict[str, Any]) -> str:
    """A table of the divergences, the checks that are their own, and what does not hold."""
    whats = list(dict.fromkeys(row["what"] for row in rows if row["of"] != "more"))
    table = []
    for name in DIVERGENCES:
        mine = [row for row in rows if row["of"] == name]
        if mine:
            table.append((name, *(_cell([row for row in mine if row["what"] == what]) for what in whats)))
    parts = [
        "Held checks of all, and the largest error as a share of what is allowed (the error of plain torch in the same "
        "dtype and one rounding, for value and gradients); 0.00 where equality to the bit is asked for."
    ]
    if table:
        parts.append(markdown_table(("divergence", *whats), table))
    more = [(row["what"], row["case"], _verdict(row)) for row in rows if row["of"] == "more"]
    if more:
        parts.append(markdown_table(("check", "case", "result"), more))
    wrong = problems(rows)
    parts.append("Not as expected:\n\n" + "\n".join(f"- {line}" for line in wrong) if wrong else "All checks hold.")
    return "\n\n".join(parts)


def _cell(rows: list[Row]) -> str:
    done = [row for row in rows if "ok" in row]
    if not done:
        return "-"
    held = sum(row["ok"] for row in done)
    left = f", {len(rows) - len(done)} left out" if len(done) < len(rows) else ""
    worst = max((row["share"] for row in done if "share" in row), default=None)
    return f"{held}/{len(done)}{'' if worst is None else f' {worst:.2f}'}{left}"


def _verdict(row: Row) -> str:
    if "left_out" in row:
        return f"left out: {row['left_out']}"
    return row.get("error") or (f"holds, {row['share']:.2f}" if row["ok"] else f"{row['share']:.3g} of what is allowed")
