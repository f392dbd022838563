"""Compare results with a baseline: ``tune run torchtune_kd/compare results=[results.jsonl] baseline=sft``."""

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from torchtune_kd.config.command import command  # first: it says in one sentence when torchtune cannot be imported

# isort: split
from omegaconf import DictConfig

from torchtune_kd.config.settings import typed
from torchtune_kd.errors import UserError, as_user_errors, nearest
from torchtune_kd.reports.comparison import Comparison, compare
from torchtune_kd.reports.comparison_report import write_report
from torchtune_kd.reports.notes import read_failures
from torchtune_kd.reports.pictures import read_curves
from torchtune_kd.reports.results import read_results
from torchtune_kd.reports.tables import as_text, overview

COLUMNS = 6  # of the table in the terminal; the report has all


@dataclass(frozen=True)
class Request:
    """Hold what is asked for.

    Attributes:
        results (list[str] | None): files that evaluate or a sweep wrote; what failed and learning curves are read
            from the ``failed.jsonl`` and ``curves.jsonl`` beside them.
        baseline (str | None): the cell or model that the others are compared with.
        output_dir (str): folder of the report.
        metrics (list[str] | None): of quality and latency, those to show; None shows all.
        title (str): of the report.
    """

    results: list[str] | None = None
    baseline: str | None = None
    output_dir: str = "comparison"
    metrics: list[str] | None = None
    title: str = "Comparison"


def read_request(written: DictConfig) -> Request:
    """Check the keys of the config; a mistake is a :class:`UserError`."""
    types = {field.name: field.type for field in fields(Request)}
    given = {str(key): value for key, value in written.items() if value is not None}
    for key in given:
        if key not in types:
            raise UserError(f"Unknown key `{key}`: {nearest(key, types)}")
    for key in given.keys() & {"results", "metrics"}:
        given[key] = [given[key]] if isinstance(given[key], str) else given[key]
    request = Request(**{key: typed(key, value, types[key]) for key, value in given.items()})
    if not request.results or request.baseline is None:
        raise UserError(
            "Expected results and a baseline: tune run torchtune_kd/compare results=[a.jsonl,b.jsonl] baseline=sft."
        )
    return request


@command
def recipe_main(cfg: DictConfig) -> None:
    """Compare every cell or model with a baseline, and write report.md, report.html, comparison.json and plots.

    Keys: ``results=[a.jsonl,b.jsonl]`` and ``baseline=sft``, and, optional, ``output_dir``, ``metrics=[kl,acc]`` and
    ``title``. They need no ``--config``, and may stand in one.
    """
    request = read_request(cfg)
    files = [Path(name).expanduser() for name in request.results]
    results = [result for file in files for result in read_results(file)]
    failures = read_failures(_beside(files, "failed.jsonl"))
    comparison = compare(results, request.baseline, metrics=request.metrics, title=request.title, failures=failures)
    curves = read_curves(_beside(files, "curves.jsonl"), {result.run for result in results})
    folder = Path(request.output_dir).expanduser()
    with as_user_errors():
        folder.mkdir(parents=True, exist_ok=True)
    _print(comparison, write_report(comparison, curves, folder))


def _beside(files: list[Path], name: str) -> list[Path]:
    """Return the files of that name in the folders of the results."""
    return [file for file in dict.fromkeys(each.resolve().parent / name for each in files) if file.is_file()]


def _print(comparison: Comparison, written: list[Path]) -> None:
    tables = [table for table in comparison.tables if table.better][:COLUMNS] or comparison.tables[:COLUMNS]
    if tables:
        grid = overview(comparison, tables)
        print(f"{as_text(grid)}\n\n{grid.caption}")
    for note in comparison.notes:
        print(note)
    print(f"\n{', '.join(map(str, written[:3]))}, and {len(written) - 3} plots")


if __name__ == "__main__":
    if not any(argument.split("=")[0] in ("--config", "-h", "--help") for argument in sys.argv):
        sys.argv[1:1] = ["--config", os.devnull]  # torchtune's parser wants a file: an empty one
    sys.exit(recipe_main())
