"""Out of memory: in which phase, and which settings would help most, with how much each saves.

The savings are estimates from the sizes of the run's own tensors. Legend: N tokens of the largest microbatch.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchao.dtypes.nf4tensor import NF4Tensor

from torchtune_kd.training.data import Batch
from torchtune_kd.training.errors import RunError
from torchtune_kd.training.models import Student, Teacher
from torchtune_kd.training.phases import OutOfMemory
from torchtune_kd.training.settings import Settings
from torchtune_kd.training.world import World

if TYPE_CHECKING:
    from torchtune_kd.training.run import Run

GIB = 2**30
WITH_ACTIVATIONS = ("student forward", "loss", "backward")
ALL = ("teacher", *WITH_ACTIVATIONS, "optimizer")


@dataclass(frozen=True)
class Advice:
    """A change of the config: how it is written, the bytes that it saves on a device, the phases that it helps."""

    change: str
    saves: int
    phases: tuple[str, ...] = ALL


@dataclass(frozen=True)
class Sizes:
    """Bytes on this device, and what they grow with."""

    batch_size: int
    sequence: int
    activations: int  # what autograd keeps of the student's layers without checkpointing
    layer_inputs: int  # what it keeps with checkpointing
    one_layer: int
    hidden: int  # last hidden states of both models and the gradient of the student's
    weights: int  # of both models, this process's share
    trained: int
    optimizer: int


@contextlib.contextmanager
def out_of_memory_explained(run: "Run", step: Sequence[Batch] | None) -> Iterator[None]:
    """Turn memory that runs out in the block into a :class:`RunError` that says where and what would help.

    Args:
        run (Run): the run.
        step (Sequence[Batch] | None): the microbatches of the step; None in a validation.
    """
    try:
        yield
    except OutOfMemory as error:
        where = f"in step {run.global_step + 1}" if step else f"in the validation after step {run.global_step}"
        sizes = measure((run.student, run.teacher), run.optimizer, step or list(itertools.islice(run.val_loader, 1)))
        advice = advise(run.cfg, run.settings, run.world, sizes)
        best = sorted((a for a in advice if error.phase in a.phases and a.saves > 0), key=lambda a: -a.saves)[:3]
        raise RunError(
            f"The memory of {run.world.device} ran out {where}, phase: {error.phase} ({_in_use(run.world.device)}"
            f"microbatches of up to {sizes.batch_size} x {sizes.sequence} tokens); what would help most, by estimate: "
            + "; ".join(f"{a.change} saves {_shown(a.saves)}" for a in best)
            + "."
        ) from error


def advise(cfg: DictConfig, settings: Settings, world: World, sizes: Sizes) -> list[Advice]:
    """Every change that would save something in this run."""
    kept = sizes.activations
    found = []
    if settings.enable_activation_checkpointing:
        kept = 0 if settings.enable_activation_offloading else sizes.layer_inputs
        if not settings.enable_activation_offloading and world.device.type == "cuda":
            found.append(Advice("`enable_activation_offloading: True`", sizes.layer_inputs, WITH_ACTIVATIONS))
    else:
        saved = sizes.activations - sizes.layer_inputs - sizes.one_layer
        found.append(Advice("`enable_activation_checkpointing: True`", saved, WITH_ACTIVATIONS))
    by_tokens = (kept + sizes.hidden) // 2
    if settings.batch_size > 1:
        half, steps = settings.batch_size // 2, settings.gradient_accumulation_steps * 2
        change = f"`batch_size: {half}` with `gradient_accumulation_steps: {steps}`"
        found.append(Advice(change, by_tokens, ("teacher", *WITH_ACTIVATIONS)))
    else:
        change = f"`tokenizer.max_seq_len: {sizes.sequence // 2}`"
        found.append(Advice(change, by_tokens, ("teacher", *WITH_ACTIVATIONS)))
    if settings.dtype == "fp32":
        half = (sizes.weights + sizes.optimizer + sizes.trained + kept) // 2
        found.append(Advice("`dtype: bf16`", half))
    name = str(cfg.optimizer["_component_"])
    if "8bit" not in name:  # two bytes an element, and in torch's AdamW state of the weights' dtype two of them
        elements = sizes.optimizer // _optimizer_bytes_per_element(settings, name)
        change = "`optimizer._component_: torchao.optim.AdamW8bit`"
        found.append(Advice(change, max(sizes.optimizer - 2 * elements, 0)))
    if sizes.trained > sizes.weights // 50:  # all weights of the student train
        found.append(Advice("a LoRA builder as `model._component_`", sizes.trained + sizes.optimizer))
    if not world.sharded:
        saved = (sizes.weights + sizes.optimizer + sizes.trained) // 2
        found.append(Advice("kd_distributed on two devices", saved))
    else:
        if not settings.fsdp_reshard_after_forward:
            whole = sizes.weights * (world.num_shards - 1)
            found.append(Advice("`fsdp_reshard_after_forward: True`", whole))
        if not settings.fsdp_cpu_offload and world.device.type == "cuda":
            found.append(Advice("`fsdp_cpu_offload: True`", sizes.weights + sizes.optimizer))
        saved = (sizes.weights + sizes.optimizer + sizes.trained) // 2
        found.append(Advice(f"{2 * world.num_shards} processes that share the weights instead of half as many", saved))
    return found


def measure(models: tuple[Student, Teacher | None], optimizer: Optimizer, batches: Sequence[Batch]) -> Sizes:
    """The run's sizes; of activations an estimate: the inputs and outputs of every linear layer."""
    student, teacher = models
    batch_size, sequence = max((batch["tokens"].shape for batch in batches), key=lambda shape: shape[0] * shape[1])
    tokens, layers = batch_size * sequence, student.decoder.layers
    weight = next(iter(student.decoder.tok_embeddings.parameters()))
    widths = [sum(_width(module) for module in layer.modules()) for layer in layers]
    hidden = weight.shape[1] * weight.element_size()
    teacher_hidden = 0
    if teacher is not None:
        table = next(iter(teacher.decoder.tok_embeddings.parameters()))
        teacher_hidden = table.shape[1] * table.element_size()
    trained = [p for p in student.parameters() if p.requires_grad]
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return Sizes(
        batch_size=batch_size,
        sequence=sequence,
        activations=tokens * sum(widths) * weight.element_size(),
        layer_inputs=tokens * len(layers) * hidden,
        one_layer=tokens * max(widths) * weight.element_size(),
        hidden=tokens * (2 * hidden + teacher_hidden),
        weights=_bytes(p for model in models if model is not None for p in model.parameters()),
        trained=_bytes(trained),
        # before the first update there is none yet: two moments in the weights' dtype
        optimizer=_bytes(state) or 2 * _bytes(trained),
    )


def _optimizer_bytes_per_element(settings: Settings, name: str) -> int:
    if name.endswith("MasterAdamW"):
        return 12
    return 2 * settings.torch_dtype.itemsize


def _width(module: nn.Module) -> int:
    """Elements per token that a matrix of a layer reads and writes; adapters count by their inner width."""
    weight = getattr(module, "weight", None)
    return sum(weight.shape) if isinstance(weight, Tensor) and weight.ndim == 2 else 0


def _bytes(tensors: Iterable[Tensor]) -> int:
    """On this device: of a sharded tensor this process's part."""
    return sum(map(_bytes_of_one, tensors))


def _bytes_of_one(tensor: Any) -> int:
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if isinstance(tensor, NF4Tensor):
        return sum(_bytes_of_one(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _shown(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _in_use(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f"{(total - free) / GIB:.2f} of {total / GIB:.2f} GiB are in use; "
