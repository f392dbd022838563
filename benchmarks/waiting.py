"""What it costs and saves that OpenMP's threads sleep while they wait (``OMP_WAIT_POLICY=PASSIVE``).

    python -m benchmarks.waiting

One iteration is four pairs of bf16 products of the size of SmolLM2-135M's layers, [256, 576] x [576, 1536] and back.
Each measurement is a process of its own on all cores. Runs with PASSIVE and without take turns, first on the machine as
it is, then beside processes that compute all the time. The time of an iteration is the mean over all of them, since
spinning costs a few long stalls, which a median would hide.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

WORKER = Path(__file__).with_name("_waiting_worker.py")
SIDES = ("spinning", "PASSIVE")


def environment(side: str) -> dict[str, str]:
    """This process's environment with libgomp's defaults, or with PASSIVE; on all cores in either case."""
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    plain = {name: value for name, value in os.environ.items() if name not in ours}
    return plain | {"OMP_WAIT_POLICY": "PASSIVE"} if side == "PASSIVE" else plain


def measure(side: str, seconds: float) -> float:
    """Return the seconds of an iteration."""
    command = [sys.executable, str(WORKER), str(seconds)]
    done = subprocess.run(command, env=environment(side), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"The worker ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return float(done.stdout)


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Let ``count`` processes compute beside the block."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.waiting", description=__doc__.split("\n\n")[0])
    parser.add_argument("--busy", type=int, nargs="*", default=[0, 1], help="busy neighbours (default: none, then one)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, in each every cell is measured once (default 3)")
    parser.add_argument("--seconds", type=float, default=2.5, help="of one measurement (default 2.5)")
    args = parser.parse_args(argv)
    if not args.busy or min(args.busy) < 0 or args.rounds < 1 or args.seconds <= 0:
        parser.error("expected --busy of at least 0, --rounds of at least 1 and --seconds above 0")

    from ._measure import describe_machine  # imports torch, which nothing above needs

    print(describe_machine())
    print(f"\n{'milliseconds an iteration':28}" + "".join(f"{side:>12}" for side in SIDES) + f"{'ratio':>10}")
    for count in args.busy:
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        with neighbours(count):
            for index in range(args.rounds):
                for side in SIDES if index % 2 == 0 else SIDES[::-1]:
                    times[side].append(measure(side, args.seconds))
        spinning, passive = (median(times[side]) for side in SIDES)
        name = f"{count} busy neighbour{'s' if count != 1 else ''}" if count else "quiet"
        print(f"{name:28}{spinning * 1000:12.2f}{passive * 1000:12.2f}{passive / spinning:9.2f}x", flush=True)


if __name__ == "__main__":
    main()
