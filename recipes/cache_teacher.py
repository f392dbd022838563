"""Write to disk what a teacher says about a config's data:

``tune run torchtune_kd/cache_teacher --config ... cache.folder=FOLDER``
``tune run --nproc_per_node 8 torchtune_kd/cache_teacher --config ... cache.folder=FOLDER``

Runs of any length, temperature and loss then distil from it with ``teacher_cache=FOLDER``.
"""

import sys

import torchtune_kd.training as kd  # first: it says in one sentence when torchtune cannot be imported

# isort: split
from omegaconf import DictConfig

from torchtune_kd import cache_teacher
from torchtune_kd.training.signals import StopRequests


@kd.command
def recipe_main(cfg: DictConfig) -> None:
    """Write what the config's teacher says about ``dataset`` and ``dataset_val``: its last hidden states, or less.

    It goes on where it was killed, on any number of processes, and adds what is new to a finished cache. The keys,
    under ``cache``: ``folder``, ``kind`` (hidden, top_k, sampled), ``dtype`` (bf16, fp32, fp16, int8), ``k``,
    ``temperatures``, ``samples``, ``positions`` (labels, all),
    ``shard_size``, ``tokens_per_batch``, ``verify``.
    """
    with kd.report_errors() as cleanup:
        cleanup.callback(kd.leave_process_group)
        request = cache_teacher.read_request(cfg)
        world = kd.join_world(request.config.settings)
        with StopRequests() as stop:
            manifest = cache_teacher.write_cache(request, world, stop)
        if world.is_rank_zero:
            print(f"{manifest.documents:,} documents, {manifest.tokens:,} tokens are in {request.folder}; distil with")
            print(f"  teacher_cache={request.folder}")


if __name__ == "__main__":
    sys.exit(recipe_main())
