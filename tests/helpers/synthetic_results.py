"""Results of models that do not exist, for the reports' tests: a grid of losses and temperatures, and its baselines."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from torchtune_kd.reports.results import Result

LOSSES = {"fkl": 0.00, "rkl": 0.05, "jsd": -0.03, "skew": -0.06}  # of their KL, against each other
TEMPERATURES = {1: 0.02, 2: -0.04, 4: 0.06}
SAME = {
    "config": "c0ffee" * 10,
    "commit": "0123abc",
    "versions": {"python": "3.11.9", "torch": "2.15.0", "torchtune": "0.6.1", "torchtune_kd": "0.1.0"},
    "machine": "Xeon Platinum 8481C, 2 cores",
    "load": 0.4,
    "time": "2026-11-27T20:00:00Z",
}


def result(name: str, task: str, metric: str, items: Sequence[float] | float, **fields: Any) -> Result:
    """A result with the mean of its items as its value, or a figure."""
    if isinstance(items, int | float):
        return Result(name, task, metric, float(items), **{**SAME, **fields})
    weights = fields.get("weights")
    value = float(np.average(items, weights=weights))
    fields = {"n": len(items), "items": list(map(float, items)), "data": f"{task}-v1", **fields}
    return Result(name, task, metric, value, **{**SAME, **fields})


def grid(seeds: Sequence[int] = (0, 1, 2), texts: int = 60, questions: int = 200) -> list[Result]:
    """Twelve cells of losses and temperatures, plain fine-tuning, the untrained student and the teacher."""
    random = np.random.default_rng(7)
    weights = random.integers(40, 160, texts).tolist()
    hard, difficult = random.gamma(4, 0.12, texts), random.normal(0, 1, questions)
    cells: list[tuple[str, float, dict[str, Any], list[int | None]]] = [("sft", 0.25, {}, list(seeds))]
    for loss, of_loss in LOSSES.items():
        for temperature, of_temperature in TEMPERATURES.items():
            place = {"kd_loss": loss, "kd_loss.temperature": temperature}
            cells.append((f"{loss}-T{temperature}", of_loss + of_temperature, place, list(seeds)))
    cells += [("untrained", 1.6, {}, [None]), ("teacher", -0.6, {}, [None])]
    lines = []
    for name, shift, place, trained in cells:
        for seed in trained:
            extra = 0.0 if seed is None else random.normal(0, 0.012)
            where = {"coordinates": place, "seed": seed, "run": None if seed is None else f"{name}-{seed}"}
            kl = np.maximum(hard * (1 + shift) + extra + random.normal(0, 0.03, texts), 0) * (name != "teacher")
            loss = 2.9 + hard + kl
            agree = np.clip(0.8 - 0.3 * kl + random.normal(0, 0.02, texts), 0, 1)
            for metric, items in ("kl", kl), ("loss", loss), ("top1_agreement", agree):
                of_text = {"weights": weights, "reference": "teacher", **where}
                lines.append(result(name, "heldout", metric, items, **of_text))
            right = difficult + random.normal(0, 0.6, questions) < 0.1 - shift / 2 - extra
            lines.append(result(name, "cities", "acc", right.astype(float), **where))
            bits = np.maximum(0.9 + 0.2 * shift + 0.1 * difficult + random.normal(0, 0.1, questions), 0)
            lines.append(result(name, "cities", "bits_per_byte", bits, **where))
            lines += _figures(name, seed, where, random)
    return lines


def curves(seeds: Sequence[int] = (0, 1, 2)) -> list[dict[str, Any]]:
    """Learning curves of the same cells, as lines of curves.jsonl."""
    random = np.random.default_rng(8)
    names = ["sft", *(f"{loss}-T{temperature}" for loss in LOSSES for temperature in TEMPERATURES)]
    lines = []
    for place, name in enumerate(names):
        for seed in seeds:
            noise = random.normal(0, 0.02, 11).cumsum()
            points = [[step, 0.5 + 0.02 * place + 3 * 0.94**step + noise[step // 10]] for step in range(0, 101, 10)]
            lines.append({"cell": name, "seed": seed, "metric": "val_kl", "points": points})
    return lines


def _figures(name: str, seed: int | None, where: dict[str, Any], random: np.random.Generator) -> list[Result]:
    teacher = name == "teacher"
    parameters = 134_515_008 if teacher else 81_413_568
    lines = []
    if seed in (None, 0):
        for task, batch in ("latency 1", 1), ("latency 8", 8):
            seconds = (0.052 if teacher else 0.029) * batch**0.3 * random.uniform(0.97, 1.03)
            lines += [
                result(name, task, "prefill_seconds_p50", seconds * 4, **where),
                result(name, task, "prefill_seconds_p90", seconds * 4.4, **where),
                result(name, task, "decode_seconds_p50", seconds, **where),
                result(name, task, "decode_seconds_p90", seconds * 1.15, **where),
                result(name, task, "tokens_per_second", batch / seconds, **where),
            ]
        lines += [
            result(name, "size", "parameters", parameters, **where),
            result(name, "size", "weight_bytes", 2 * parameters, **where),
            result(name, "size", "file_bytes", 2 * parameters + 4096, **where),
        ]
    if seed is not None:
        distils = name != "sft"
        seconds = 102.0 if distils else 70.0
        lines += [
            result(name, "training", "training_tokens", 25_500, **where),
            result(name, "training", "student_flops", 1.24e13, **where),
            result(name, "training", "teacher_flops", 6.9e12 * distils, **where),
            result(name, "training", "training_seconds", seconds + random.uniform(-3, 3), **where),
            result(name, "training", "peak_bytes", 2.1e9, **where),
        ]
    return lines
