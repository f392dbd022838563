"""Check before training that a cache is of this run's teacher, tokenizer and data."""

from collections.abc import Sequence

from torch.utils.data import Dataset
from tqdm import tqdm

from torchtune_kd.caches.layout import IMPORTED
from torchtune_kd.caches.reader import CacheReader
from torchtune_kd.checkpoints.identity import differences, teacher_identity, tokenizer_identity
from torchtune_kd.config.checks import checkpoint_files
from torchtune_kd.config.reading import Config
from torchtune_kd.data.datasets import Parts, read_row
from torchtune_kd.data.documents import documents_in_sample
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError
from torchtune_kd.teachers.cached_sparse import check_sparse_cache

_MANY_ROWS = 5000  # of a process: so many show a progress bar


def check_cached_models(config: Config, reader: CacheReader) -> None:
    """Refuse a cache of another tokenizer, or of another teacher than the config names beside it.

    A ``teacher_model`` may be left out; weights that ``teacher_checkpointer`` names and that are not on this machine
    are not compared.

    Raises:
        UserError: naming what differs.
    """
    manifest = reader.manifest
    check_sparse_cache(config, manifest)
    files = "files of the tokenizer"
    if manifest.tokenizer.get(files) != tokenizer_identity(config)[files]:
        raise UserError(
            f"The cache in {reader.folder} was written with other files of the tokenizer: name those under "
            "`tokenizer`, or write a cache with these."
        )
    if config.teacher_model is None:
        return
    section = config.teacher_checkpointer
    here = section is not None and all(file.is_file() for file in checkpoint_files(section))
    ours = teacher_identity(config, weights=here)
    theirs = {key: value for key, value in manifest.teacher.items() if here or key.startswith("teacher_model")}
    found = differences({"teacher": theirs}, {"teacher": ours}, ("teacher",))
    if found:
        raise UserError(
            f"The teacher of the config is not that of the cache in {reader.folder}: {'; '.join(found)}; correct it, "
            "delete `teacher_model` and `teacher_checkpointer`, or delete `teacher_cache` to run this teacher."
        )


def check_cached_data(
    reader: CacheReader, dataset: Dataset, name: str, world: World, parts: Sequence[int] = ()
) -> None:
    """Refuse a dataset with a document that is not in the cache, or not with all of its labelled tokens.

    Each process looks at its part of the rows.

    Args:
        reader (CacheReader): of the cache.
        dataset (Dataset): whose rows will be asked for.
        name (str): ``dataset`` or ``dataset_val``.
        world (World): the processes.
        parts (Sequence[int]): the cache's teacher teaches these of several datasets; empty for all.

    Raises:
        UserError: on every process, with the number of such rows.
    """
    rows = range(world.rank, len(dataset), world.size)
    hidden = not world.is_rank_zero or len(rows) < _MANY_ROWS
    missing = 0
    for index in tqdm(rows, desc=f"Documents of {name} in the cache", leave=False, disable=hidden):
        if parts and isinstance(dataset, Parts) and dataset.part_of(index) not in parts:
            continue
        documents = documents_in_sample(read_row(dataset, index, name))
        missing += not all(reader.index.holds(document.key, document.positions) for document in documents)
    missing = sum(world.gather(missing))
    if missing:
        add = "import a source that holds them"
        if IMPORTED not in reader.manifest.teacher:
            add = (
                "run `tune run torchtune_kd/cache_teacher` with the config of this teacher and these data and "
                f"cache.folder={reader.folder}, which adds what is missing"
            )
        raise UserError(
            f"{missing:,} of the {len(dataset):,} rows of `{name}` are not in the cache {reader.folder}, or not with "
            f"all of their labelled tokens: {add}."
        )
