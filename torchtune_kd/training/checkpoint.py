"""What is saved at the end of an epoch: merged weights and, for a student with adapters, these alone too."""

import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import training
from torchtune.modules.peft import (
    DoRALinear,
    LoRALinear,
    get_adapter_params,
    get_adapter_state_dict,
    get_merged_lora_ckpt,
)
from tqdm import tqdm

from torchtune_kd.training.adapters import without_checkpoint_wrapper
from torchtune_kd.training.loading import gather_weights
from torchtune_kd.training.models import Student
from torchtune_kd.training.preflight import epoch_folders, output_folder
from torchtune_kd.training.settings import Settings
from torchtune_kd.training.world import World


def save_epoch(
    student: Student, checkpointer: Any, cfg: DictConfig, settings: Settings, world: World, epoch: int
) -> None:
    """Write ``epoch_<epoch>`` with torchtune's checkpointer: all processes gather, rank 0 writes."""
    if checkpointer is None:
        if world.is_rank_zero:
            tqdm.write(f"epoch {epoch}: nothing is exported, since `checkpointer` is null (random_weights: True)")
        return
    weights = full_state_dict(student.decoder, world)
    if world.is_rank_zero:
        content: dict[str, Any] = {}
        adapter = adapter_config(student.decoder)
        if adapter is not None:
            content[training.ADAPTER_KEY] = get_adapter_state_dict(weights)
            content[training.ADAPTER_CONFIG] = adapter
            weights = get_merged_lora_ckpt(weights, rank=adapter["r"], alpha=adapter["lora_alpha"])
        content[training.MODEL_KEY] = weights
        stale = _set_aside(output_folder(cfg, settings)) if epoch == 0 else []
        checkpointer.save_checkpoint(
            content,
            epoch=epoch,
            intermediate_checkpoint=False,
            adapter_only=settings.save_adapter_weights_only,
        )
        for folder in stale:
            shutil.rmtree(folder)
    world.barrier()


def _set_aside(output: Path) -> list[Path]:
    """Rename the epochs of an earlier run, which are there only where ``overwrite_output_dir`` allowed it."""
    return [folder.rename(folder.with_name(f"replaced_{folder.name}")) for folder in epoch_folders(output)]


def full_state_dict(decoder: nn.Module, world: World) -> dict[str, Tensor]:
    """All weights, gathered and dequantised, in host memory; empty on every process but rank 0."""
    if world.sharded:
        return gather_weights(decoder, world)
    # a copy where the weights are on the CPU already: merging adapters writes in place
    state = {name: weight.detach().to("cpu", copy=True) for name, weight in decoder.state_dict().items()}
    for name, parameter in decoder.named_parameters():
        if isinstance(parameter, NF4Tensor):  # torchtune's hook gives bf16 whatever the run's dtype
            state[without_checkpoint_wrapper(name)] = parameter.detach().to(parameter.dtype).cpu()
    return state


def adapter_config(decoder: nn.Module) -> dict[str, Any] | None:
    """PEFT's description of the adapters, read off the modules; None for a full-weight student."""
    if not get_adapter_params(decoder):
        return None
    adapted = {n: m for n, m in decoder.named_modules() if isinstance(m, (LoRALinear, DoRALinear))}
    first = next(iter(adapted.values()))
    rank = first.lora_a.out_features
    alpha = first.scaling * rank if isinstance(first, DoRALinear) else first.alpha
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in adapted}),
        "peft_type": "LORA",
        "use_dora": isinstance(first, DoRALinear),
    }
