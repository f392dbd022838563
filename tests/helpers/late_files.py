"""Write a cache on a network file system that shows each process late what the others have written.

Rank 0 lists no shard that was written since it began; the others find neither head, shard nor manifest. See
tests/caches/test_finish.py.
"""

import time

import torch.distributed as dist

from torchtune_kd.cache_teacher import folder, run
from torchtune_kd.caches.index import Index, whole_shards
from torchtune_kd.caches.layout import SHARDS, CacheManifest
from torchtune_kd.recipes import cache_teacher


def _not_there(*_: object) -> None:
    raise FileNotFoundError(2, "No such file or directory")


def recipe_main() -> None:
    began = time.time()
    if dist.get_rank() == 0:
        folder.whole_shards = lambda where: [
            name for name in whole_shards(where) if (where / SHARDS / name).stat().st_mtime < began
        ]
    else:
        run.load_file = _not_there
        folder.read_header = _not_there
        Index.of_shards = _not_there
        CacheManifest.read = _not_there
    cache_teacher.recipe_main()
