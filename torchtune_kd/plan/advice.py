"""Out of memory: in which phase, and which settings would help most, with how much each saves.

What a setting saves is what ``torchtune_kd/plan`` computes for that phase without it, less what it computes with it.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from torchtune_kd._torchtune import component_from_path, instantiation_error
from torchtune_kd.config.reading import Config
from torchtune_kd.config.sections import Section
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import OutOfMemory, RunError
from torchtune_kd.plan.communication import Layout
from torchtune_kd.plan.dry_run import dry_step, dry_validation
from torchtune_kd.plan.memory import plan_memory
from torchtune_kd.plan.meta_models import as_run, build_models
from torchtune_kd.training.run import Run

GIB = 2**30
BEST = 3  # settings that are named
LORA = {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True, "lora_rank": 16}
ADAM_8BIT = "torchao.optim.AdamW8bit"


@dataclass(frozen=True)
class Shape:
    """Hold the shape of the microbatches that ran out of memory."""

    batch_size: int
    sequence: int
    validation: bool = False


@dataclass(frozen=True)
class Case:
    """A run as ``torchtune_kd/plan`` needs it."""

    config: Config
    layout: Layout
    shape: Shape

    def phases(self) -> dict[str, int]:
        """Compute the highest number of bytes in each phase of a step.

        Raises:
            UserError: if a model cannot be built.
        """
        models = as_run(build_models(self.config, self.layout.shards))
        run = dry_validation if self.shape.validation else dry_step
        shape = self.shape
        memory, _ = plan_memory(self.config, models, self.layout, shape.sequence, batch_size=shape.batch_size, run=run)
        return {"student forward" if phase == "student" else phase: size for phase, size in memory.phases.items()}


@dataclass(frozen=True)
class Change:
    """One thing to do otherwise: how it is written, and what it makes of the run."""

    text: str
    keys: dict[str, Any] = field(default_factory=dict)
    layout: Layout | None = None
    shape: Shape | None = None

    def of(self, case: Case) -> Case:
        config = case.config.with_keys(self.keys)
        return replace(case, config=config, layout=self.layout or case.layout, shape=self.shape or case.shape)


@contextlib.contextmanager
def out_of_memory_explained(run: Run) -> Iterator[None]:
    """Turn memory that runs out in the block into a :class:`RunError` that says where and what would help.

    Args:
        run (Run): the run; its ``microbatches`` are those of the step, None in a validation.
    """
    try:
        yield
    except OutOfMemory as error:
        step = run.microbatches
        where = f"in step {run.global_step + 1}" if step else f"in the validation after step {run.global_step}"
        batches = step or list(itertools.islice(run.val_loader, 1))
        batch_size, sequence = max((batch.tokens.shape for batch in batches), key=lambda shape: shape.numel())
        world, shards = run.world, run.world.num_shards
        layout = Layout(shards=shards, replicas=world.size // shards, sharded=world.sharded)
        case = Case(run.config, layout, Shape(batch_size, sequence, validation=step is None))
        with run.stop_requests:  # a signal must not hide what is to be explained
            said = advice(case, error.phase)
        raise RunError(
            f"The memory of {world.device} ran out {where}, phase: {error.phase} ({_in_use(world)}"
            f"microbatches of up to {batch_size} x {sequence} tokens); {said}"
        ) from error


def advice(case: Case, phase: str) -> str:
    """Name the changes that lower this phase's memory most, and by how much: the end of the sentence."""
    try:
        before = case.phases()[phase]
    except Exception as why:  # whatever it is, it must not hide what it was to explain
        return f"what would help cannot be worked out ({type(why).__name__}: {' '.join(str(why).split())[:200]})."
    saved = []
    for change in changes(case):
        # what does not go together with the run, such as a builder that wants other arguments, is no advice
        with contextlib.suppress(Exception):
            saved.append((before - change.of(case).phases()[phase], change.text))
    best = sorted((item for item in saved if item[0] > 0), key=lambda item: -item[0])[:BEST]
    if not best:
        return "no setting would save any: take a smaller model."
    named = "; ".join(f"{text} saves {_shown(size)}" for size, text in best)
    return f"what would help most, as `tune run torchtune_kd/plan` computes it: {named}."


def changes(case: Case) -> Iterator[Change]:
    """Yield everything that could save something in this run."""
    config, layout, shape = case.config, case.layout, case.shape
    settings = config.settings
    on_gpu = settings.torch_device.type == "cuda"
    if not settings.enable_activation_checkpointing:
        key = "enable_activation_checkpointing"
        yield Change(f"`{key}: True`", {key: True})
    elif on_gpu and not settings.enable_activation_offloading:
        key = "enable_activation_offloading"
        yield Change(f"`{key}: True`", {key: True})
    if shape.batch_size > 1:
        half = shape.batch_size // 2
        smaller = replace(shape, batch_size=half)
        if shape.validation:
            yield Change(f"`batch_size_val: {half}`", {"batch_size_val": half}, shape=smaller)
        else:
            steps = settings.gradient_accumulation_steps * settings.batch_size // half
            keys = {"batch_size": half, "gradient_accumulation_steps": steps}
            yield Change(" with ".join(f"`{key}: {value}`" for key, value in keys.items()), keys, shape=smaller)
    else:
        half = shape.sequence // 2
        yield Change(f"`tokenizer.max_seq_len: {half}`", shape=replace(shape, sequence=half))
    if settings.dtype == "fp32":
        yield Change("`dtype: bf16`", {"dtype": "bf16"})
    if "8bit" not in config.optimizer.component:
        keys = {"optimizer._component_": ADAM_8BIT, "optimizer.fused": None, "optimizer.foreach": None}
        yield Change(f"`optimizer._component_: {ADAM_8BIT}`", keys)
    yield from _adapters(config.model)
    if not layout.sharded:
        yield Change("torchtune_kd/kd_distributed on two devices", layout=Layout(shards=2, sharded=True))
        return
    if not settings.fsdp_reshard_after_forward:
        yield Change("`fsdp_reshard_after_forward: True`", {"fsdp_reshard_after_forward": True})
    if on_gpu and not settings.fsdp_cpu_offload:
        yield Change("`fsdp_cpu_offload: True`", {"fsdp_cpu_offload": True})
    more = replace(layout, shards=2 * layout.shards)
    yield Change(f"{more.shards} processes that share the weights instead of {layout.shards}", layout=more)


def _adapters(section: Section) -> Iterator[Change]:
    """Few trained weights in place of all, few bits of those that are not trained."""
    module, _, name = section.component.rpartition(".")
    lora, quantised = f"{module}.lora_{name}", f"{module}.q{name}"
    if _exists(lora):
        keys = {"model._component_": lora, **{f"model.{key}": value for key, value in LORA.items()}}
        yield Change(f"`model._component_: {lora}` of rank {LORA['lora_rank']}", keys)
    if name.startswith("lora_") and _exists(quantised):
        yield Change(f"`model._component_: {quantised}`", {"model._component_": quantised})


def _exists(component: str) -> bool:
    try:
        component_from_path(component)
    except instantiation_error():
        return False
    return True


def _shown(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _in_use(world: World) -> str:
    if world.device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(world.device)
    return f"{(total - free) / GIB:.2f} of {total / GIB:.2f} GiB are in use; "
