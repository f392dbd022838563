"""Checks of the kernels that are no part of the grid: addresses, labels, metrics, graphs and a process group.

Legend: N tokens, V vocabulary.
"""

import tempfile
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ._cases import BF16, F32, Case, make_factors, make_labels, make_logits
from ._formulas import DIVERGENCES, IGNORE, mean_objective, metric_sums
from ._job import Job, Skip
from .kernels import Share, exactly, gradients, largest, share

FAR = (17408, 128256)  # N and V of logits whose last rows lie beyond 2^31 elements
FAR_BYTES = 24 * 2**30  # logits of both models and a gradient, and room
GRAPHED = ("forward_kl", "jsd")  # one of two passes over the logits, one of three


def checks(job: Job, backend: str) -> Iterable[tuple[str, str, Callable[[], Share]]]:
    """Yield what is checked, with what, and the check."""
    device = job.device
    case = Case(50257, 24, 2.0, 0.5, "some", (BF16, BF16))
    case = case.small if job.rehearse else case
    fours = case._replace(tokens=case.tokens // 4 * 4)
    for layout in ("strided", "transposed", "expanded", "int32", "on the CPU"):
        yield f"labels {layout}", fours.name, lambda layout=layout: check_labels(layout, fours, device, backend)
    for name in ("forward_kl", "jsd"):
        yield "metrics", f"{name}, {case.name}", lambda name=name: check_metrics(name, case, device, backend)
    for name, dtype in product(DIVERGENCES, (BF16, F32)):
        stored = case._replace(dtypes=(dtype, dtype))
        yield (
            "stored ids",
            f"{name}, {stored.name}",
            lambda name=name, stored=stored: check_stored(name, stored, device, backend),
        )
    for name in GRAPHED:
        yield "torch.compile", f"{name}, {case.name}", lambda name=name: check_compiled(name, case, device, backend)
        yield "process group of 1", f"{name}, {case.name}", lambda name=name: check_group(name, case, device, backend)
        shape = "N={} V={}".format(*FAR)
        yield "beyond 2^31 elements", f"{name}, {shape}", lambda name=name: check_far_rows(name, job, backend)
    for name in GRAPHED:  # last: a capture that fails may leave the device unusable for this process
        yield "CUDA graph", f"{name}, {case.name}", lambda name=name: check_graph(name, case, device, backend)


def _settings(name: str, case: Case, backend: str) -> dict:
    return {"divergence": name, "temperature": case.temperature, "kd_ratio": case.kd_ratio, "backend": backend}


def check_labels(layout: str, case: Case, device: str, backend: str) -> Share:
    """Labels ``[4, N/4]`` of any strides, of int32 and in host memory give the bits of contiguous ones."""
    from torchtune_kd.kernels import linear_kd_loss, softmax_kd_loss

    settings = _settings("forward_kl", case, backend)
    student, teacher = make_logits(case, device)
    student, teacher = (z.unflatten(0, (4, -1)) for z in (student, teacher))  # [B, S, V]
    labels = make_labels(case, device).view(student.shape[:2])
    if layout == "strided":
        given = torch.stack([labels, labels + 1], -1)[..., 0]
    elif layout == "transposed":
        given = labels.t().contiguous().t()
    elif layout == "expanded":
        labels = labels[:1].repeat(len(labels), 1)
        given = labels[:1].expand(len(labels), -1)
    else:
        given = labels.int() if layout == "int32" else labels.cpu()
    factors = make_factors(case, device)
    factors.student_hidden.requires_grad_(), student.requires_grad_()
    hidden = [x.unflatten(0, (4, -1)) for x in (factors.student_hidden, factors.teacher_hidden)]

    def call(labels: Tensor) -> list[Tensor]:
        loss = softmax_kd_loss(student, teacher, labels, **settings)
        heads = (hidden[0], factors.student_weight, hidden[1], factors.teacher_weight)
        linear = linear_kd_loss(*heads, labels, **settings)
        return [loss.detach(), *gradients(loss, student), linear.detach(), *gradients(linear, factors.student_hidden)]

    return exactly(all(map(torch.equal, call(labels), call(given))))


def check_metrics(name: str, case: Case, device: str, backend: str) -> Share:
    """Sums of all metrics against their formulas in fp64, to 1e-5 of each, or of 1 where that is more."""
    from torchtune_kd.kernels import METRICS, softmax_kd_loss

    student, teacher = make_logits(case, device)
    labels = make_labels(case, device)
    settings = _settings(name, case, backend)
    _, found = softmax_kd_loss(student.requires_grad_(), teacher, labels, return_metrics=True, **settings)
    right = metric_sums(student.detach().double(), teacher.double(), labels, name, case.temperature)
    if set(found) != {*METRICS, "num_tokens"} or int(found["num_tokens"]) != int((labels != IGNORE).sum()):
        return float("inf")
    return max(share(abs(found[key].item() - right[key]), 1e-5 * max(1.0, abs(right[key]))) for key in METRICS)


def check_stored(name: str, case: Case, device: str, backend: str) -> Share:
    """Compare ``linear_sparse_kd_loss`` of up to 64 stored ids a token, in chunks, with PyTorch's arithmetic in fp64.

    Both have the logits as the model rounds them, and write their gradient in its dtype.
    """
    from torchtune_kd.kernels import linear_sparse_kd_loss

    factors, labels = make_factors(case, device), make_labels(case, device)
    log_probs = factors.logits()[1].double()[labels != IGNORE].log_softmax(-1)
    ids = log_probs.topk(min(64, case.vocab // 2)).indices
    tail = log_probs.scatter(-1, ids, -torch.inf).div_(case.temperature).logsumexp(-1)
    hidden, weight = factors.student_hidden.requires_grad_(), factors.student_weight
    found = []
    for dtype, of_kernel in ((torch.float64, "torch"), (torch.float32, backend)):
        loss = linear_sparse_kd_loss(
            hidden, weight, ids, log_probs.gather(-1, ids).to(dtype), tail.to(dtype), labels,
            student_bias=factors.student_bias, chunk_tokens=case.chunk_tokens, **_settings(name, case, of_kernel),
        )  # fmt: skip
        found.append((loss.detach().double(), gradients(loss, hidden)[0].double()))
    (right, expected), (loss, grad) = found
    rounding = {F32: 1e-5, BF16: 1.6e-2}[hidden.dtype]
    of_grad = share(largest(grad - expected), rounding * largest(expected))
    return max(of_grad, share(abs(loss - right).item(), 4e-6 * max(1.0, right.item())))


def check_compiled(name: str, case: Case, device: str, backend: str) -> Share:
    """Inside of ``torch.compile`` both functions give the bits of eager calls, without a break in the graph."""
    from torchtune_kd.kernels import linear_kd_loss, softmax_kd_loss

    settings = _settings(name, case, backend)
    student, teacher = make_logits(case, device)
    factors, labels = make_factors(case, device), make_labels(case, device)
    student.requires_grad_(), factors.student_hidden.requires_grad_()
    heads = (factors.student_hidden, factors.student_weight, factors.teacher_hidden, factors.teacher_weight)

    def losses() -> tuple[Tensor, Tensor]:
        return softmax_kd_loss(student, teacher, labels, **settings), linear_kd_loss(*heads, labels, **settings)

    def results(call: Callable[[], tuple[Tensor, Tensor]]) -> list[Tensor]:
        one, two = call()
        return [one.detach(), two.detach(), *gradients(one + two, student, factors.student_hidden)]

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    return exactly(all(map(torch.equal, results(losses), results(compiled))))


def check_graph(name: str, case: Case, device: str, backend: str) -> Share:
    """A captured CUDA graph gives the bits of an eager call, also on inputs that it has not seen."""
    if device != "cuda":
        raise Skip("there is no CUDA graph on a CPU")
    from torchtune_kd.kernels import softmax_kd_loss

    settings = _settings(name, case, backend)
    student, teacher = make_logits(case, device)
    labels = make_labels(case, device)
    student.requires_grad_()

    def step() -> list[Tensor]:
        loss = softmax_kd_loss(student, teacher, labels, **settings)
        return [loss.detach(), *gradients(loss, student)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    good = True
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for there, new in zip((student, teacher), make_logits(case, device), strict=True):
                there.copy_(new)
            labels.copy_(make_labels(case, device))
        graph.replay()
        good = good and all(map(torch.equal, captured, step()))
    return exactly(good)


def check_group(name: str, case: Case, device: str, backend: str) -> Share:
    """With a process group of one the kernels of shards agree with those of whole rows, as far as fp32 goes."""
    if backend == "torch":
        raise Skip("shards need Triton")
    from torchtune_kd.kernels import softmax_kd_loss

    settings = _settings(name, case, backend)
    student, teacher = make_logits(case, device)
    labels = make_labels(case, device)
    student.requires_grad_()
    loss = softmax_kd_loss(student, teacher, labels, **settings)
    (right,) = gradients(loss, student)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
        try:
            sharded = softmax_kd_loss(student, teacher, labels, group=dist.group.WORLD, **settings)
            (grad,) = gradients(sharded, student)
        finally:
            dist.destroy_process_group()
    return max(
        share(largest(sharded - loss), 2e-6 * max(1.0, loss.item())),
        share(largest(grad.double() - right.double()), 8e-3 * largest(right)),
    )


def check_far_rows(name: str, job: Job, backend: str) -> Share:
    """Logits of more than 2^31 elements: the last rows are read and written where they stand."""
    if job.device != "cuda":
        raise Skip("they do not fit a rehearsal")
    free = torch.cuda.mem_get_info()[0]
    if free < FAR_BYTES:
        raise Skip(f"they need {FAR_BYTES / 2**30:.0f} GiB and {free / 2**30:.0f} GiB are free")
    from torchtune_kd.kernels import softmax_kd_loss

    tokens, vocab = FAR
    student, teacher = (torch.empty(FAR, dtype=BF16, device=job.device).normal_(std=2) for _ in range(2))
    labels = torch.full((tokens,), IGNORE, device=job.device)
    labels[-8:] = torch.randint(0, vocab, (8,), device=job.device)
    student.requires_grad_()
    loss = softmax_kd_loss(student, teacher, labels, divergence=name, temperature=2.0, kd_ratio=0.5, backend=backend)
    (grad,) = gradients(loss, student)
    last = student.detach()[-8:].double().requires_grad_()
    truth = mean_objective(last, teacher[-8:].double(), labels[-8:], name, 2.0, 0.5)
    (right,) = gradients(truth, last)
    if grad[:-8].any():
        return float("inf")
    return max(
        share(largest(loss.detach() - truth.detach()), 2e-6 * max(1.0, truth.item())),
        share(largest(grad[-8:].double() - right), 8e-3 * largest(right)),
    )
