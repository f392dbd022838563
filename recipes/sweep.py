"""Many runs over a grid, resumed and shared: ``tune run torchtune_kd/sweep --config torchtune_kd/smollm2/sweep...``."""

import sys

import torchtune_kd.training as kd  # first: it says in one sentence when torchtune cannot be imported

# isort: split
from omegaconf import DictConfig

from torchtune_kd import sweeps


@kd.command
def recipe_main(cfg: DictConfig) -> int:
    """Train every cell of a grid with every seed, evaluate it, and write one file of results.

    A killed sweep goes on where it stood with the same command; several on one folder share the runs. The keys are
    those of ``torchtune_kd/sweeps/request.py``: ``run_recipe``, ``run_config`` and ``overrides`` of the runs,
    ``grid``, ``cells``, ``exclude``, ``seeds``, ``tune``, ``models``, ``evaluate``, ``slots``, ``devices_per_run``,
    ``keep``, ``dry_run``.
    """
    request = sweeps.read_request(cfg)
    if request.keys.dry_run:
        print(sweeps.forecast(request))
        return 0
    results, failed, file = sweeps.run_sweep(request)
    print(f"{len(results)} lines are in {file}; compare them by")
    print(f"  tune run torchtune_kd/compare results=[{file}] baseline=NAME")
    for run in failed:
        print(f"failed: {run}: {run.failure['message']}", file=sys.stderr)
    return kd.RunError.exit_code if failed else 0


if __name__ == "__main__":
    sys.exit(recipe_main())
