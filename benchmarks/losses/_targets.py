"""What the kernels are meant to reach, and what a run measured of it."""

from collections.abc import Callable
from typing import NamedTuple

from ._case import LLAMA, MEMORY_TOKENS, Case
from ._run import Result

NOT_YET = "not yet measured on a GPU"
_SOFTMAX = Case()
_LINEAR = Case(op="linear")
_JSD = _SOFTMAX._replace(divergence="jsd", kd_ratio=1.0)
_HALF = _LINEAR._replace(ignored=0.5)


class Target(NamedTuple):
    """One line of the table of targets."""

    text: str
    wanted: str
    measured: str
    verdict: str  # met, missed, or why it is open


def targets(results: list[Result], device: str) -> list[Target]:
    """Those of a GPU, with numbers if the run was on one, and that of a CPU if it was on a CPU."""
    found = {result.case._replace(peers="all"): result for result in results}
    lines = _gpu(found)
    if device != "cuda":
        lines = [line._replace(measured="-", verdict=NOT_YET) for line in lines]
        lines.append(_cpu(results))
    return lines


def _gpu(found: dict[Case, Result]) -> list[Target]:
    shape = f"N=8192, V={LLAMA}"
    return [
        _at_most(f"softmax forward KL + CE with gradient, {shape}", found, _SOFTMAX, 3.7e-3),
        _faster("the same against torch.compile of torchtune's loss", found, _SOFTMAX, "torchtune-compile", 5),
        _faster(f"softmax JSD with gradient, {shape}, against Liger's in fp32", found, _JSD, "liger-jsd", 5),
        _faster("the same against Liger's in bf16", found, _JSD, "liger-jsd-bf16", 5),
        _at_most(f"linear, widths 2048/4096, frozen head, {shape}", found, _LINEAR, 28e-3),
        _faster("the same against Liger's chunked distillation", found, _LINEAR, "liger-chunked-compile", 2),
        _faster("the same against flash-linear-attention's fused KL", found, _LINEAR, "fla-fused-kl", 2),
        _half("half the tokens ignored, labels on the CPU: share of that time", found, _HALF),
        _half("half the tokens ignored, labels on the device", found, _HALF._replace(labels_on_device=True)),
        _memory("extra memory of linear at every N up to 65536", found),
    ]


def _ours(found: dict[Case, Result], case: Case) -> float | None:
    """Seconds of our Triton kernels."""
    cell = found[case].cell("ours-triton") if case in found else None
    return cell.seconds if cell else None


def _judge(text: str, wanted: str, value: float | None, show: Callable[[float], str], good: bool, why: str) -> Target:
    if value is None:
        return Target(text, wanted, "-", why)
    return Target(text, wanted, show(value), "met" if good else "missed")


def _why(found: dict[Case, Result], case: Case, key: str) -> str:
    """Why there is no number."""
    cell = found[case].cell(key) if case in found else None
    return f"{key}: {cell.missing if cell and cell.missing else 'not part of this run'}"


def _at_most(text: str, found: dict[Case, Result], case: Case, limit: float) -> Target:
    value = _ours(found, case)
    why = _why(found, case, "ours-triton")
    return _judge(text, f"<= {limit * 1e3:g} ms", value, lambda v: f"{v * 1e3:.2f} ms", (value or 0) <= limit, why)


def _faster(text: str, found: dict[Case, Result], case: Case, peer: str, times: float) -> Target:
    ours = _ours(found, case)
    cell = found[case].cell(peer) if case in found else None
    ratio = cell.seconds / ours if ours and cell and cell.seconds else None
    why = _why(found, case, peer if ours else "ours-triton")
    return _judge(text, f">= {times:g}x", ratio, lambda v: f"{v:.2f}x", (ratio or 0) >= times, why)


def _half(text: str, found: dict[Case, Result], case: Case) -> Target:
    whole, half = _ours(found, _LINEAR), _ours(found, case)
    share = half / whole if whole and half else None
    why = _why(found, case if whole else _LINEAR, "ours-triton")
    return _judge(text, "<= 60 %", share, lambda v: f"{v:.0%}", (share or 0) <= 0.6, why)


def _memory(text: str, found: dict[Case, Result]) -> Target:
    """Above the inputs and the gradient of the hidden states, which grows with N whatever is done."""
    most, largest, missing = None, 0, ""
    for case, result in found.items():
        if case.op != "linear" or case.trainable_head:
            continue
        cell = result.cell("ours-triton")
        if cell and cell.extra_bytes is not None:
            most, largest = max(most or 0, cell.extra_bytes), max(largest, case.tokens)
        else:
            missing = missing or _why(found, case, "ours-triton")
    complete = largest >= max(MEMORY_TOKENS)
    why = missing or f"ours-triton: largest N measured is {largest}"
    return _judge(
        text, "<= 1.2 GB", most if complete else None, lambda v: f"{v / 1e9:.2f} GB", (most or 0) <= 1.2e9, why
    )


def _cpu(results: list[Result]) -> Target:
    """Ours in torch against the fastest peer of every case, by the fastest calls: they feel other work least."""
    text, wanted = "on a CPU, backend='torch' against the fastest peer of every case, fastest calls", ">= 1x"
    ratios = {}
    for result in results:
        ours = result.cell("ours-torch")
        peers = [cell.fastest for cell in result.cells if cell.fastest and not cell.key.startswith("ours")]
        if ours and ours.fastest and peers:
            ratios[result.case.name] = min(peers) / ours.fastest
    if not ratios:
        return Target(text, wanted, "-", "no peer ran")
    worst = min(ratios, key=ratios.get)
    verdict = (
        "met" if ratios[worst] >= 1 else f"missed in {sum(ratio < 1 for ratio in ratios.values())} of {len(ratios)}"
    )
    return Target(text, wanted, f"{ratios[worst]:.2f}x at worst, {worst}", verdict)
