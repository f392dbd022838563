"""What a run will need, before anything is downloaded: ``tune run torchtune_kd/plan --config ... devices=8``."""

import json
import sys

import torchtune_kd.training as kd  # first: it says in one sentence when torchtune cannot be imported

# isort: split
from omegaconf import DictConfig

from torchtune_kd import plan


@kd.command
def recipe_main(cfg: DictConfig) -> None:
    """Print parameters, memory per device, FLOPs, communication, the largest batch and the expected step time.

    The config is one of ``kd_single_device`` or ``kd_distributed``. These keys are the plan's own, all optional:
    ``devices``, ``device_memory`` (80GiB), ``gpu`` (A100, H100, H200, B200, L40S, RTX4090), ``tflops`` and
    ``bandwidth`` (GB/s) in place of the table's, ``link_bandwidth`` and ``network_bandwidth`` (GB/s in one direction),
    ``sequence_length``, and ``json=True``, also written ``--json``, which prints nothing but JSON.
    """
    planned = plan.plan_run(*plan.read_request(cfg))
    print(json.dumps(plan.as_dict(planned), indent=2) if planned.request.json else plan.as_text(planned))


if __name__ == "__main__":
    sys.argv = ["json=True" if argument == "--json" else argument for argument in sys.argv]
    sys.exit(recipe_main())
