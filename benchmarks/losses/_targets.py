"""State what the kernels are to reach, as shares of what the device can do at best, and what a run measured of it.

Where a target is a time, it is a share of the case's bound at the rates of the device that the run measured: the bytes
of the passes, or the matrix products. Ratios to peers are reported, beside the largest that code with these passes can
have, which is the peer's time over that bound; how fast others are is not ours to promise.
"""

from collections.abc import Callable
from typing import NamedTuple

from ._case import LLAMA, MEMORY_TOKENS, Case
from ._counts import Rates, bound
from ._run import Result

NOT_HERE = "needs a GPU"
_SOFTMAX = Case()
_LINEAR = Case(op="linear")
_JSD = _SOFTMAX._replace(divergence="jsd", kd_ratio=1.0)
_HALF = _LINEAR._replace(ignored=0.5)


class Target(NamedTuple):
    """One line of the table of targets."""

    text: str
    wanted: str
    measured: str
    verdict: str  # met, missed, reported where nothing is promised, or why it is open


def targets(results: list[Result], device: str, rates: Rates) -> list[Target]:
    """Those of a GPU, with numbers if the run was on one, and that of a CPU if it was on a CPU."""
    found = {result.case._replace(peers="all"): result for result in results}
    if device == "cuda":
        return _gpu(found, rates)
    return [*(line._replace(verdict=NOT_HERE) for line in _gpu({}, None)), _cpu(results)]


def _gpu(found: dict[Case, Result], rates: Rates | None) -> list[Target]:
    """Those of a GPU; without its rates they are shares alone."""
    shape = f"N=8192, V={LLAMA}"
    softmax = f"softmax forward KL + CE with gradient, {shape}"
    jsd = f"softmax JSD with gradient, {shape}"
    linear = f"linear, widths 2048/4096, frozen head, {shape}"
    return [
        _reaches(f"{softmax}: of two passes", found, _SOFTMAX, 0.85, rates),
        _reaches("the same at T = 2", found, _SOFTMAX._replace(temperature=2.0), 0.85, rates),
        _reaches(f"{jsd}: of three passes", found, _JSD, 0.8, rates),
        # with the loss's own bytes at the memory's rate no more than about 90 % can be reached, the logits being apart
        _reaches(f"{linear}: of the matrix products", found, _LINEAR, 0.85, rates),
        _half("half the tokens ignored, labels on the CPU: share of that time", found, _HALF),
        _half("half the tokens ignored, labels on the device", found, _HALF._replace(labels_on_device=True)),
        _memory("extra memory of linear at every N up to 65536", found),
        _against(f"{softmax}: against torch.compile of torchtune's loss", found, _SOFTMAX, "torchtune-compile", rates),
        _against(f"{jsd}: against Liger's in fp32", found, _JSD, "liger-jsd", rates),
        _against(f"{jsd}: against Liger's in bf16", found, _JSD, "liger-jsd-bf16", rates),
        _against(f"{linear}: against Liger's chunked distillation", found, _LINEAR, "liger-chunked-compile", rates),
        _against(f"{linear}: against flash-linear-attention's fused KL", found, _LINEAR, "fla-fused-kl", rates),
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


def _reaches(text: str, found: dict[Case, Result], case: Case, least_share: float, rates: Rates | None) -> Target:
    """Judge a time by the share of it that the case's bound is."""
    value, why = _ours(found, case), _why(found, case, "ours-triton")
    if rates is None:
        return Target(text, f">= {least_share:.0%}", "-", why)
    least = bound(case, rates).seconds
    share = least / value if value else 0.0
    wanted = f">= {least_share:.0%} ({least / least_share * 1e3:.2f} ms)"
    return _judge(text, wanted, value, lambda v: f"{share:.0%} ({v * 1e3:.2f} ms)", share >= least_share, why)


def _against(text: str, found: dict[Case, Result], case: Case, peer: str, rates: Rates | None) -> Target:
    """Report how many times as long a peer takes."""
    ours = _ours(found, case)
    cell = found[case].cell(peer) if case in found else None
    if rates is None or not (ours and cell and cell.seconds):
        return Target(text, "-", "-", _why(found, case, peer if ours else "ours-triton"))
    most = cell.seconds / bound(case, rates).seconds
    return Target(text, f"at most {most:.2f}x at the bound", f"{cell.seconds / ours:.2f}x", "reported")


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
