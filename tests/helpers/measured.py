"""Runs that are large enough to be measured: configs of a given size without files, and the memory that a run takes."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from helpers.tiny import make_config, model_section
from torchtune_kd.data.steps import microbatches
from torchtune_kd.plan.tracker import tensor_bytes

# Millions of student weights: layers of teacher and student, width, width of the MLP, vocabulary.
SIZES = {
    1: (4, 2, 256, 512, 384),
    12: (6, 4, 256, 1024, 32768),
    50: (10, 6, 512, 2048, 49152),
    100: (20, 10, 768, 2048, 49152),
}
TEXT = "the quick brown fox jumps over the lazy dog, then sits in the sun; " * 20


def sized_config(folder: Path, size: int, kind: str, sequence: int = 128, **overrides: Any) -> DictConfig:
    """A config over random models of about ``size`` million weights, every sequence ``sequence`` tokens long."""
    teacher_layers, student_layers, width, inner, vocab = SIZES[size]
    defaults = {"batch_size": 4, "dtype": "bf16", "gradient_accumulation_steps": 2}
    cfg = make_config(folder, kind, rows=[TEXT] * 16, **(defaults | overrides))
    cfg.merge_with({"checkpointer": None, "teacher_checkpointer": None, "random_weights": True})
    cfg.tokenizer.max_seq_len = sequence + 1  # torchtune cuts text to one less
    shape = {"num_heads": 8, "num_kv_heads": 4, "embed_dim": width, "intermediate_dim": inner}
    more = {"vocab": vocab, "max_seq_len": sequence}
    cfg.model = model_section(kind, {"num_layers": student_layers, **shape}, **more)
    cfg.teacher_model = model_section("full", {"num_layers": teacher_layers, **shape}, tied=False, **more)
    return cfg


def weight_bytes(run: Any) -> int:
    """Return what all models of a run hold on this process, tables and averages included."""
    teacher = run.teacher.teacher
    members = getattr(teacher, "members", (teacher,))
    models = [getattr(member, "decoder", member) for member in members]  # a cached one has none, or is no module
    modules = [model for model in (*models, run.student.decoder) if isinstance(model, nn.Module)]
    tensors = [tensor for model in modules for tensor in (*model.parameters(), *_buffers(model))]
    for member in members:
        if getattr(member, "head", None) is not None:  # in 8-bit floats
            tensors += member.head.weight
    tensors += [tensor for name, tensor in teacher.kept_state().items() if name != "steps"]
    return sum(tensor_bytes(t.to_local() if isinstance(t, DTensor) else t) for t in tensors)


def measure_two_steps(recipe: Any) -> int:
    """Bytes of tensors at the highest point of the first two optimizer steps, by the allocator's own account."""
    run = recipe._run
    held = weight_bytes(run)
    steps = list(microbatches(run.loader, run.settings.gradient_accumulation_steps, 2))

    def take_steps() -> None:
        for step in steps:
            recipe.train_step(run, step)

    return held + allocated(take_steps)[0]


def allocated(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes that ``run`` has allocated on the CPU at its highest point, and at its end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak, level


def _buffers(model: nn.Module) -> list[Tensor]:
    return list({id(buffer): buffer for buffer in model.buffers()}.values())


def measured_step(cfg: DictConfig, recipe: type) -> tuple[int, Any]:
    """Run ``recipe`` for two steps; returns the bytes and the run, closed."""
    gc.collect()  # what is left of an earlier run must not be freed during this one
    made = recipe(cfg)
    made.setup()
    run = made._run
    try:
        assert next(iter(run.loader)).tokens.shape == (cfg.batch_size, cfg.tokenizer.max_seq_len - 1)
        return measure_two_steps(made), run
    finally:
        made.cleanup()
