"""What is saved at the end of an epoch: merged weights, and for a student with adapters these alone in a subfolder."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import training
from torchtune.modules.peft import get_adapter_state_dict, get_merged_lora_ckpt
from tqdm import tqdm

from torchtune_kd._torchtune import writing_to
from torchtune_kd.checkpoints import folders
from torchtune_kd.checkpoints.folders import output_folder
from torchtune_kd.checkpoints.peft_export import adapter_config, finish_export
from torchtune_kd.config.reading import Config
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import RunError, first_line
from torchtune_kd.models.adapters import without_checkpoint_wrapper
from torchtune_kd.models.loading import gather_weights
from torchtune_kd.models.student import Student
from torchtune_kd.storage import atomic


def save_epoch(
    student: Student,
    checkpointer: Any,
    config: Config,
    world: World,
    epoch: int,
    previous_run: list[Path],
    announce: Callable[[str], None],
) -> None:
    """Write ``epoch_<epoch>`` with torchtune's checkpointer: all processes gather, rank 0 writes.

    The merged weights stand in the folder, the adapters in its subfolder ``adapter``. It appears whole or not at all:
    it is written beside, flushed to disk and renamed. ``previous_run`` is what an earlier run left, see
    :func:`atomic.publish`.

    Raises:
        RunError: on all processes, if it cannot be written.
    """
    settings = config.settings
    announce("export")
    if checkpointer is None:
        if world.is_rank_zero:
            tqdm.write(f"epoch {epoch}: nothing is exported, since `checkpointer` is null (random_weights: True)")
        return
    weights, problem = full_state_dict(student.decoder, world), None
    if world.is_rank_zero:
        content: dict[str, Any] = {}
        adapter, described = None, adapter_config(student.decoder, config.checkpointer)
        if described is not None:
            adapter = get_adapter_state_dict(weights)
            content[training.ADAPTER_KEY] = adapter
            content[training.ADAPTER_CONFIG] = described
            weights = get_merged_lora_ckpt(weights, rank=described["r"], alpha=described["lora_alpha"])
        content[training.MODEL_KEY] = weights
        folder = output_folder(config) / f"epoch_{epoch}"
        try:
            with _written_whole(checkpointer, folder, previous_run) as written:
                checkpointer.save_checkpoint(
                    content,
                    epoch=epoch,
                    intermediate_checkpoint=False,
                    adapter_only=settings.save_adapter_weights_only,
                )
                finish_export(written, student.decoder, adapter, checkpointer, config.checkpointer, settings)
                announce("rename")
        except _FAILURES as error:
            problem = f"({first_line(error)}): make room there, "
            if folders.step_folders(folder.parent):
                problem += "then go on from the last checkpoint with `resume_from_checkpoint: True`."
            else:
                problem += "then start again; with `save_every_n_steps` set there would be a checkpoint to go on with."
    problem = world.gather(problem)[0]
    if problem is not None:
        output = output_folder(config)
        raise RunError(f"The weights of epoch {epoch} could not be written to {output} {problem}")


# safetensors' own error is a plain Exception, torch's a RuntimeError
_FAILURES = (OSError, RuntimeError, SafetensorError)


@contextlib.contextmanager
def _written_whole(checkpointer: Any, folder: Path, previous_run: list[Path]) -> Iterator[Path]:
    """Let the checkpointer write ``folder`` beside it, and publish it when the block ends without an error.

    Yields:
        Path: where it lies meanwhile.
    """
    beside = atomic.partial(folder)
    shutil.rmtree(beside, ignore_errors=True)
    with atomic.discarded_on_failure(folder), writing_to(checkpointer, beside):
        yield beside / folder.name
        atomic.publish(beside / folder.name, folder, previous_run)
    beside.rmdir()


def full_state_dict(decoder: nn.Module, world: World) -> dict[str, Tensor]:
    """Gather all weights, dequantised, in host memory; return none on every process but rank 0."""
    if world.sharded:
        return gather_weights(decoder, world)
    # a copy where the weights are on the CPU already: merging adapters writes in place
    state = {name: weight.detach().to("cpu", copy=True) for name, weight in decoder.state_dict().items()}
    for name, parameter in decoder.named_parameters():
        if isinstance(parameter, NF4Tensor):  # torchtune's hook gives bf16 whatever the run's dtype
            state[without_checkpoint_wrapper(name)] = parameter.detach().to(parameter.dtype).cpu()
    return state
