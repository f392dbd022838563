"""The command; ``benchmarks.losses`` says what it measures."""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from .._device import copy_rate, describe_device, instruction_rate, matrix_rate
from . import __doc__ as description
from . import _llama
from ._case import Case, plan
from ._counts import Rates
from ._implementations import IMPLEMENTATIONS, versions
from ._report import Setting, case_table, footnotes, heading, now, target_table, write
from ._run import CHECKOUT, GRACE, Clock, Result, run_cases, select

MINUTES, QUICK_MINUTES = 9.0, 2.0
# Seconds to repeat one cell for, by type of device and --quick.
BUDGETS = {("cuda", False): 0.4, ("cuda", True): 0.3, ("cpu", False): 1.0, ("cpu", True): 0.5}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "--llama" in argv:
        _llama.main([word for word in argv if word != "--llama"])
        return
    args = _parse(argv)
    cases = [case for case in plan(args.device, args.quick) if _wanted(case, args)]
    if args.list:
        _print_list(cases, args.device)
        return
    if not cases:
        raise SystemExit("no case is left; --list shows the cases and implementations")
    clock = Clock(60 * (args.minutes or (QUICK_MINUTES if args.quick else MINUTES)) - GRACE)
    setting = Setting(
        args.device,
        describe_device(args.device),
        versions(),
        shlex.join(["python", "-m", "benchmarks.losses", *argv]),
        Rates(copy_rate(args.device), matrix_rate(args.device), instruction_rate(args.device)),
        now(),
    )
    print(heading(setting), flush=True)
    budget = BUDGETS[args.device, args.quick]
    measured: dict[Case, Result] = {}

    def show(result: Result) -> None:
        measured[result.case] = result
        print("\n" + case_table(result, setting.rates), flush=True)

    try:
        run_cases(cases, args.device, args.implementations, budget, clock, show)
    finally:  # what was measured is not lost to an interrupt
        results = list(measured.values())
        print("\nNotes\n" + (footnotes(results) or "none"))
        print("\n" + target_table(results, args.device, setting.rates))
        for path in write(setting, results, args.output):
            print(f"wrote {path}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.losses",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few cases, at most 2 minutes")
    parser.add_argument("--llama", action="store_true", help="the Llama 3 shape on a CPU; has a --help of its own")
    parser.add_argument("--list", action="store_true", help="show cases and implementations, measure nothing")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases whose name holds each of these")
    parser.add_argument("--implementations", nargs="+", metavar="WORD", help="those whose name holds one of these")
    parser.add_argument("--minutes", type=float, help="time for the whole run (default 9, with --quick 2)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument(
        "--output",
        type=Path,
        default=CHECKOUT / "benchmarks" / "reports",
        metavar="FOLDER",
        help="where the reports go (default benchmarks/reports)",
    )
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, but PyTorch sees none")
    if args.minutes is not None and args.minutes * 60 <= GRACE:
        parser.error(f"--minutes must be above {GRACE / 60:.1f}, but got {args.minutes:g}")
    return args


def _wanted(case: Case, args: argparse.Namespace) -> bool:
    return all(word in case.name for word in args.only or ()) and bool(select(case, args.implementations, args.device))


def _print_list(cases: list[Case], device: str) -> None:
    print("Cases:")
    for case in cases:
        print(f"  {case.name}" + (" (ours only)" if case.peers == "none" else ""))
    print("Implementations:")
    for one in IMPLEMENTATIONS:
        print(f"  {one.key} ({', '.join(one.ops)}): {one.missing(device) or 'runs here'}")


if __name__ == "__main__":
    main()
