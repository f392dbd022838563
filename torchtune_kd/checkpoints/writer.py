"""A checkpoint of a running run: a folder ``step_<n>`` that ``torch.distributed.checkpoint`` writes and reads.

Every process writes its shards and its random generators, rank 0 the manifest. A folder that bears the name is whole
(see :mod:`torchtune_kd.storage.atomic`), and may be read on another number of processes than wrote it.
"""

import contextlib
import copy
import io
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # has no public name
from torch.utils._pytree import tree_map_only

import torchtune_kd
from torchtune_kd.checkpoints import folders
from torchtune_kd.checkpoints.progress import Progress
from torchtune_kd.distributed.world import SETUP_TIMEOUT, World
from torchtune_kd.errors import UserError, first_line
from torchtune_kd.storage import atomic
from torchtune_kd.storage.manifest import Damaged, Manifest, file_facts

# torch's writer raises RuntimeError where a file cannot be written
_FAILURES = (OSError, RuntimeError, CheckpointException)


class SnapshotWriter:
    """Writes checkpoints into ``output``, one at a time, and deletes those that are no longer kept.

    Args:
        output (Path): the folder that the ``step_<n>`` lie in.
        world (World): all its processes call every method together.
        previous_run (list[Path]): what an earlier run left there, see :func:`atomic.publish`.
        keep_last_n (int): how many of the newest are kept.
        is_better (Callable[[Manifest, Manifest], bool] | None): whether the first is better than the second; the
            best is kept besides.
        in_background (bool): copy the state to host memory and write it while training goes on.
        say (Callable[[str], None]): how rank 0 tells what went wrong.
        announce (Callable[[str], None]): told of ``save``, ``manifest`` and ``rename``.
    """

    def __init__(
        self,
        output: Path,
        world: World,
        *,
        previous_run: list[Path],
        keep_last_n: int,
        is_better: Callable[[Manifest, Manifest], bool] | None,
        in_background: bool,
        say: Callable[[str], None],
        announce: Callable[[str], None],
    ) -> None:
        if in_background and world.sharded:  # a group of its own, since the training thread uses the other meanwhile
            world = replace(world, host_group=dist.new_group(backend="gloo", timeout=SETUP_TIMEOUT))
        self._output, self._world, self._previous_run = output, world, previous_run
        self._say, self._announce = say, announce
        self._keep_last_n, self._is_better = keep_last_n, is_better
        self._pool = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._under_way: Future[bool] | None = None
        self._good = True  # the last checkpoint could be written

    def write(self, state: dict[str, Any], manifest: Manifest) -> None:
        """Write ``step_<n>``; one that cannot be written is given up with a sentence, and :meth:`finish` tells.

        Args:
            state (dict[str, Any]): (nested) tensors and plain values; sharded tensors as DTensors.
            manifest (Manifest): what else is to be known; ``files`` is filled in here.
        """
        self.finish()
        if self._pool is None:
            self._good = self._write(state, manifest)
            return
        staged, problem = None, None
        try:
            staged = tree_map_only(Tensor, host_copy, state)
        except (RuntimeError, MemoryError) as error:
            problem = f"its copy in host memory: {_cause(error)}"
        self._under_way = self._pool.submit(self._write, staged, copy.deepcopy(manifest), problem)

    def finish(self) -> bool:
        """Wait for what is being written in the background; False if the last checkpoint could not be written."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            self._good = under_way.result()
        return self._good

    def close(self) -> None:
        """Wait, and end the thread."""
        self.finish()
        if self._pool is not None:
            self._pool.shutdown()

    def _write(self, state: dict[str, Any] | None, manifest: Manifest, problem: str | None = None) -> bool:
        """False if it could not be written; ``problem`` is what this process knows beforehand, without a ``state``."""
        self._announce("save")
        folder = folders.step_folder(self._output, manifest.progress["global_step"])
        partial = atomic.partial(folder)
        problem = self._world.first(problem) if self._pool is not None else problem
        written = self._world.gather(self._write_shards(state, partial) if problem is None else (problem, {}))
        problem = next((problem for problem, _ in written if problem is not None), None)
        if self._world.is_rank_zero and problem is None:
            manifest.files = {name: fact for _, facts in written for name, fact in facts.items()}
            try:
                problem = _missing_on_rank_zero(partial, [facts for _, facts in written])
                if problem is None:
                    self._announce("manifest")
                    manifest.write(partial)
                    self._announce("rename")
                    atomic.publish(partial, folder, self._previous_run)
            except OSError as error:
                problem = _cause(error)
            if problem is None:
                self._rotate()
        problem = self._world.first(problem)
        if problem is None:
            return True
        if self._world.reads_files:  # each node's, since it may not be the same folder
            shutil.rmtree(partial, ignore_errors=True)
        if self._world.is_rank_zero:
            self._say(
                f"warning: the checkpoint {folder} could not be written ({problem}): the run goes on, and the "
                "checkpoint before it stays the last."
            )
        self._world.barrier()  # nobody begins the next one before all have deleted this one
        return False

    def _write_shards(self, state: dict[str, Any], partial: Path) -> tuple[str | None, dict[str, Any]]:
        """Write this process's shards; return what went wrong, if anything did, and the facts of its files."""
        try:
            with _single_process_is_no_surprise():
                dcp.save(
                    state,
                    storage_writer=dcp.FileSystemWriter(partial, sync_files=True),
                    **_members(self._world),
                )
            return None, {path.name: file_facts(path) for path in partial.iterdir() if self._is_mine(path)}
        except _FAILURES as error:
            return _cause(error), {}

    def _is_mine(self, path: Path) -> bool:
        """Return whether a file is this process's: ``__<rank>_<n>.distcp``, and on rank 0 whatever else there is."""
        if path.suffix == ".distcp":
            return path.name.startswith(f"__{self._world.rank}_")
        return self._world.is_rank_zero

    def _rotate(self) -> None:
        """Delete what is neither among the newest nor the best. Rank 0 alone; what resists is tried again next time."""
        found = folders.step_folders(self._output)
        kept = found[: self._keep_last_n]
        if self._is_better is not None:
            best = None
            for folder in reversed(found):
                with contextlib.suppress(Damaged):
                    manifest = Manifest.read(folder)
                    if manifest.validation is not None and (best is None or self._is_better(manifest, best[0])):
                        best = manifest, folder
            kept = kept if best is None else [*kept, best[1]]
        for folder in found:
            if folder not in kept:
                try:
                    atomic.delete(folder)
                except OSError as error:
                    self._say(f"warning: the old checkpoint {folder} could not be deleted ({_cause(error)}).")


def host_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor of any type, layout and sharding to the CPU; nothing shares memory with ``tensor``.

    Types made of other tensors (DTensor, torchao's optimizer states) are copied part by part: few of them know how to
    copy themselves, and torch's own stagers ask them to.
    """
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.detach().to("cpu", copy=True)
    names, context = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}
    parts = {name: host_copy(part) if isinstance(part, Tensor) else part for name, part in parts.items()}
    return type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())


def check_whole(folder: Path, world: World) -> Manifest:
    """Read every file of a checkpoint, each process its part, and compare it with the manifest.

    Raises:
        Damaged: on all processes, with what rank 0 or the first other process found.
        UserError: if it is whole, and another version wrote it that counts otherwise.
    """
    problem = manifest = None
    try:
        manifest = Manifest.read(folder)
        manifest.check_files(folder, sorted(manifest.files)[world.rank :: world.size])
    except (Damaged, OSError) as error:
        problem = str(error)
    problem = world.first(problem)
    if problem is not None:
        raise Damaged(problem)
    differences = Progress.differences(manifest.progress)
    if differences:
        raise UserError(
            f"The checkpoint {folder} was written by torchtune_kd {manifest.versions.get('torchtune_kd')}, whose "
            f"record of the run's progress is another ({', '.join(differences)}), and this is "
            f"{torchtune_kd.__version__}: go on with that version or choose another `output_dir`."
        )
    return manifest


def read_state(folder: Path, state: dict[str, Any], world: World) -> None:
    """Fill ``state``, laid out like what was written, in place; DTensors get their shards."""
    with _single_process_is_no_surprise():
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), **_members(world))


def pack(value: Any) -> Tensor:
    """Plain values and tensors as bytes (uint8), which any process can read whatever their size."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def unpack(packed: Tensor) -> Any:
    return torch.load(io.BytesIO(packed.numpy().tobytes()), weights_only=True)


def layout(folder: Path) -> dict[str, Any]:
    """Return torch's metadata of each tensor that a checkpoint holds, by dotted name."""
    return dcp.FileSystemReader(folder).read_metadata().state_dict_metadata


def room_for(found: Any) -> Tensor:
    """Room for something packed, given its metadata."""
    return torch.empty(found.size, dtype=torch.uint8)


def _missing_on_rank_zero(partial: Path, facts: list[dict[str, Any]]) -> str | None:
    """Return the files of other ranks that are missing on rank 0, as a message; None if there are none."""
    for rank, names in enumerate(facts):
        for name, fact in names.items():
            try:
                with (partial / name).open("rb") as file:  # network file systems look anew when a file is opened
                    size = os.fstat(file.fileno()).st_size
            except FileNotFoundError:
                size = None
            if size != fact["bytes"]:
                found = f"lacks {name}" if size is None else f"has {size} of {fact['bytes']} bytes of {name}"
                return (
                    f"`output_dir` is not the same folder on every node: on rank 0's {partial} {found}, which rank "
                    f"{rank} has written; put `output_dir` on a file system that all nodes share"
                )
    return None


def _members(world: World) -> dict[str, Any]:
    """Tell torch who writes or reads together; without a process group it knows by itself (2.6 cannot be told)."""
    alone = dist.is_initialized() and not world.sharded
    return {"process_group": world.host_group} | ({"no_dist": True} if alone else {})


@contextlib.contextmanager
def _single_process_is_no_surprise() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _cause(error: BaseException) -> str:
    """Return what the disk said, where it said something; torch wraps it in its own words."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    cause = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return first_line(cause or error)
