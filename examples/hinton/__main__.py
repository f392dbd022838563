"""The command: runs the experiments in turn, and writes what each found as it ends."""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from . import __doc__ as description
from .digits import load_splits
from .experiments import ensemble, few_data, omitted, temperature
from .plots import write_plots
from .report import Findings, summary
from .specialists import specialists

EXPERIMENTS = {
    "temperature": temperature,
    "data": few_data,
    "omitted": omitted,
    "ensemble": ensemble,
    "specialists": specialists,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiments that the command line asks for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    splits = load_splits(args.seeds)
    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "examples.hinton", *arguments]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "scikit-learn")} | {"python": platform.python_version()},
        "seconds": {},
        "cpu_seconds": {},
    }
    findings: dict[str, Findings] = {}
    for name in args.only:
        start, cpu_start = time.perf_counter(), time.process_time()
        findings[name] = EXPERIMENTS[name](splits)
        record["seconds"][name] = round(time.perf_counter() - start, 1)
        record["cpu_seconds"][name] = round(time.process_time() - cpu_start, 1)
        print(findings[name].markdown(), end="\n\n", flush=True)
        write(findings, record, args.output_dir)
    print(summary([claim for each in findings.values() for claim in each.claims]))
    minutes, cpu_minutes = (sum(record[clock].values()) / 60 for clock in ("seconds", "cpu_seconds"))
    print(f"\n{minutes:.1f} minutes, {cpu_minutes:.1f} of CPU; tables, figures and plots are in {args.output_dir}.")


def write(findings: dict[str, Findings], record: dict[str, Any], folder: Path) -> None:
    """Write tables and sentences, every figure, and the plots."""
    claims = [claim for each in findings.values() for claim in each.claims]
    texts = [each.markdown() for each in findings.values()]
    (folder / "report.md").write_text("\n\n".join([*texts, summary(claims)]) + "\n", encoding="utf-8")
    figures = record | {"experiments": {name: each.as_dict() for name, each in findings.items()}}
    (folder / "results.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_plots(findings, folder)


class Parser(argparse.ArgumentParser):
    """Ends with the sentence alone, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line, and see that nothing is missing before the first experiment takes its minutes."""
    parser = Parser(
        prog="python -m examples.hinton", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="random splits, at least 2 (default 10)")
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help=f"some of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--output-dir", type=Path, default=Path("hinton-output"), help="default: hinton-output")
    args = parser.parse_args(arguments)
    if args.seeds < 2:
        parser.error(f"expected --seeds of at least 2, since a standard error takes two, but got {args.seeds}.")
    args.only = [name.strip() for name in args.only.split(",")]
    if unknown := [name for name in args.only if name not in EXPERIMENTS]:
        parser.error(f"expected --only to name some of {', '.join(EXPERIMENTS)}, but got {unknown[0]!r}.")
    if any(find_spec(module) is None for module in ("sklearn", "matplotlib")):
        parser.error(
            "the digits are in scikit-learn and the plots are matplotlib's: pip install 'torchtune-kd[evidence]'."
        )
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"expected a folder to write into as --output-dir, but {args.output_dir}: {error.strerror}.")
    return args


if __name__ == "__main__":
    main()
