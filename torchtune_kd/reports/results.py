"""Results of evaluations: one JSON object a line, with a versioned schema.

A line is one metric of one model on one task. It holds the value, its standard error over the task's items, the items
themselves where they were asked for (paired comparisons need them), and where it comes from, so that a line can be
read alone.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from torchtune_kd.errors import UserError

SCHEMA = 1


class Metric(NamedTuple):
    """Say how a metric is called, printed and read.

    Attributes:
        label (str): in tables and pictures.
        unit (str): "nats/token", "bits/byte", "share", "tokens/s", "s", "bytes"; empty for a plain number.
        better (int): 1 where larger is better, -1 where smaller is, 0 where it is a fact.
    """

    label: str
    unit: str
    better: int


METRICS = {
    # held-out text
    "loss": Metric("next-token loss", "nats/token", -1),
    "perplexity": Metric("perplexity", "", -1),
    "kl": Metric("KL to the reference", "nats/token", -1),
    "top1_agreement": Metric("same most likely token", "share", 1),
    "acceptance_rate": Metric("acceptance rate", "share", 1),
    "entropy": Metric("entropy", "nats/token", 0),
    # multiple choice
    "acc": Metric("accuracy", "share", 1),
    "acc_norm": Metric("accuracy by length", "share", 1),
    "bits_per_byte": Metric("bits per byte of the answer", "bits/byte", -1),
    # speed and size
    "prefill_seconds_p50": Metric("prefill, median", "s", -1),
    "prefill_seconds_p90": Metric("prefill, 90th percentile", "s", -1),
    "decode_seconds_p50": Metric("a token, median", "s", -1),
    "decode_seconds_p90": Metric("a token, 90th percentile", "s", -1),
    "tokens_per_second": Metric("tokens per second", "tokens/s", 1),
    "peak_bytes": Metric("peak memory", "bytes", -1),
    "parameters": Metric("parameters", "", 0),
    "weight_bytes": Metric("weights in memory", "bytes", -1),
    "table_bytes": Metric("of them embedding and head", "bytes", 0),
    "file_bytes": Metric("weights on disk", "bytes", -1),
    # what training took
    "training_tokens": Metric("tokens trained on", "", 0),
    "training_steps": Metric("optimizer steps", "", 0),
    "training_seconds": Metric("device seconds of training", "s", -1),
    "teacher_seconds": Metric("of them the teacher's", "s", -1),
    "student_seconds": Metric("of them the student's", "s", -1),
    "teacher_flops": Metric("FLOPs of the teacher on these tokens", "FLOP", -1),
    "student_flops": Metric("FLOPs of the student on these tokens", "FLOP", -1),
}


@dataclass(frozen=True)
class Result:
    """One metric of one model on one task.

    Attributes:
        model (str): its name.
        task (str): "heldout", "cities", ...; "latency 8" is latency at batch 8; "size" and "training" are of the model.
        metric (str): a key of :data:`METRICS`, or a name that lm-eval gives.
        value (float): the mean over the items, weighted where they have weights, or the figure itself.
        se (float | None): standard error of ``value`` over the items; None where there are none.
        n (int): items.
        items (Sequence[float] | None): the value of each item, in the task's order.
        weights (Sequence[float] | None): of the items, for example their tokens; None where all count the same.
        reference (str | None): the model that a distance was measured against.
        data (str | None): fingerprint of the items; only equal ones can be compared.
        cell (str | None): the name of the sweep's cell.
        coordinates (Mapping[str, Any]): the cell's values of the grid, by key.
        seed (int | None): of the training run.
        run (str | None): identity of the training run, SHA-256 of its resolved config without folders.
        evaluation (str | None): identity of what a sweep measures of each run.
        config (str): SHA-256 of the resolved config of the evaluation.
        commit (str | None): of the source, where it is a checkout.
        versions (Mapping[str, str]): of Python and the packages.
        machine (str): processor or GPU, with cores or devices: latencies of other machines are not compared.
        load (float | None): processes that ran or waited, over the last minute (1 is one core).
        seconds (float): that the task took.
        time (str): when it ended, UTC, ISO 8601.
        schema (int): version of these fields.
    """

    model: str
    task: str
    metric: str
    value: float
    se: float | None = None
    n: int = 0
    items: Sequence[float] | None = None
    weights: Sequence[float] | None = None
    reference: str | None = None
    data: str | None = None
    cell: str | None = None
    coordinates: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    run: str | None = None
    evaluation: str | None = None
    config: str = ""
    commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    load: float | None = None
    seconds: float = 0.0
    time: str = ""
    schema: int = SCHEMA

    @property
    def name(self) -> str:
        """Return what the line is compared by: the cell of a sweep, or the model's name."""
        return self.cell or self.model


def to_lines(results: Iterable[Result]) -> str:
    """Return results as the lines of a file; what is no finite number becomes null."""
    plain = ({key: _finite(value) for key, value in asdict(result).items()} for result in results)
    return "".join(
        json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n" for line in plain
    )


def append_results(results: Iterable[Result], file: Path) -> None:
    """Add results to ``file``, which may not be there yet; a line that a crash cut short is ended first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as output:
        if output.tell():
            output.seek(-1, 2)
            if output.read(1) != b"\n":
                output.write(b"\n")
        output.write(to_lines(results).encode())


def read_results(file: Path) -> list[Result]:
    """Read the results of a file. A last line that a crash cut short is left out.

    Raises:
        UserError: if the file cannot be read, holds something else, or is of another schema.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The results {file} cannot be read ({error}): name a file that evaluate wrote.") from error
    known = {each.name for each in fields(Result)}
    needed = {each.name for each in fields(Result) if each.default is MISSING and each.default_factory is MISSING}
    results = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # without an end, so that a crash cut it short
                continue
            raise UserError(f"Line {number} of {file} is no JSON: remove it, or name a file of results.") from error
        if not isinstance(content, dict) or "schema" not in content:
            raise UserError(f"Line {number} of {file} is no result: name a file that evaluate or a sweep wrote.")
        if content["schema"] != SCHEMA or not needed <= content.keys() <= known:
            raise UserError(
                f"Line {number} of {file} is of schema {content['schema']}, and this version reads {SCHEMA}: read it "
                "with the version that wrote it, or measure again."
            )
        content["value"] = math.nan if content["value"] is None else content["value"]
        results.append(Result(**content))
    return results


def _finite(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
