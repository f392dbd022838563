"""The command; ``benchmarks.gpu`` says what it does."""

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import __doc__ as description
from ._job import CHECKOUT
from ._report import Report
from ._runner import run_group
from ._sections import MINUTES, OVERHEAD, REHEARSAL_MINUTES, SECTIONS, groups, minutes_of

REPORTS = CHECKOUT / "benchmarks" / "reports"


def main(argv: list[str] | None = None) -> int:
    """Run the sections in turn; returns 1 if one failed or found what should not be."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    wanted = groups(args.sections, together=args.rehearse)
    started = datetime.now(timezone.utc)
    command = shlex.join(["python", "-m", "benchmarks.gpu", *argv])
    names = [section.name for group in wanted for section in group]
    report = Report(args.output, command, started, args.rehearse, names)
    begun = end = time.monotonic()
    usual = OVERHEAD + sum(map(minutes_of, wanted))
    scale = 60 if args.minutes is None else 60 * args.minutes / usual
    try:
        with tempfile.TemporaryDirectory() as folder:
            for group in wanted:
                if args.rehearse:
                    end = begun + 60 * args.minutes
                else:
                    end += scale * minutes_of(group)
                outcomes = run_group(
                    group,
                    device=args.device,
                    rehearse=args.rehearse,
                    end=end,
                    folder=Path(folder),
                    facts=report.facts,
                    parallel=args.parallel,
                    progress=report.update,
                )
                report.update(outcomes)
                for section in group:
                    print(_said(report, section.name), flush=True)
    except KeyboardInterrupt:
        print("Interrupted: the report holds what was found until then.", file=sys.stderr)
    for line in report.problems:
        print(f"not as expected: {line}")
    for file in report.files:
        print(f"wrote {file}")
    return 1 if report.problems else 0


def _said(report: Report, name: str) -> str:
    found = report.as_dict()["sections"].get(name)
    if found is None:
        return f"{name}: not started, the time was up"
    return f"{name}: {found['state']} in {found['seconds']:.0f} s" + (f" ({found['why']})" if found["why"] else "")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [section.name for section in SECTIONS]
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, in under two minutes")
    parser.add_argument("--sections", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"time for the sections together (default {MINUTES:g} for all, to rehearse {REHEARSAL_MINUTES:g})",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda, to rehearse the cpu")
    parser.add_argument("--parallel", type=int, help="processes for what is not timed (default: 3 for 4 cores)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="for the report (default benchmarks/reports, to rehearse a temporary folder)",
    )
    args = parser.parse_args(argv)
    args.device = args.device or ("cpu" if args.rehearse else "cuda")
    if args.device == "cpu" and not args.rehearse:
        parser.error("the true shapes take hours on a CPU: add --rehearse for tiny ones")
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("a CUDA device is needed, but PyTorch sees none; --rehearse runs the same code on the CPU")
    if args.rehearse:
        args.minutes = args.minutes or REHEARSAL_MINUTES
    args.parallel = args.parallel or max(2, 3 * (os.cpu_count() or 2) // 4)
    if args.output is None:
        args.output = Path(tempfile.mkdtemp(prefix="gpu-rehearsal-")) if args.rehearse else REPORTS
    return args


if __name__ == "__main__":
    sys.exit(main())
