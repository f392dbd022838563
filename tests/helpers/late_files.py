"""The writer of a cache on a network file system that shows each process late what the others have written.

Rank 0 lists no shard; the others find neither head nor manifest. See tests/caches/test_finish.py.
"""

import torch.distributed as dist

from torchtune_kd.cache_teacher import folder, run
from torchtune_kd.caches.layout import CacheManifest
from torchtune_kd.recipes import cache_teacher


def _not_there(*_: object) -> None:
    raise FileNotFoundError(2, "No such file or directory")


def recipe_main() -> None:
    if dist.get_rank() == 0:
        folder.whole_shards = lambda where: []
    else:
        run.load_file = _not_there
        CacheManifest.read = _not_there
    cache_teacher.recipe_main()
