"""The config surface: every key a recipe reads, its type and default, in one place.

A key of the YAML is either a setting (a field of :class:`Settings`), a component (a section with a
``_component_``, listed in :data:`COMPONENTS`), one of ``teacher_head``, ``teacher_weights``, ``teacher_cache`` and
``teacher_tail``, which name what a teacher is by a word or a folder, or a name that other keys interpolate
(``${name}``). Anything else is an error that names the key and the nearest known one.
"""

import dataclasses
import math
import re
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torchtune import training

from torchtune_kd.errors import UserError, nearest

REQUIRED_COMPONENTS = (
    "model",
    "tokenizer",
    "checkpointer",
    "dataset",
    "optimizer",
    "kd_loss",
    "metric_logger",
)
TEACHER_COMPONENTS = ("teacher_model", "teacher_checkpointer")  # not needed at kd_ratio 0
OPTIONAL_COMPONENTS = ("dataset_val", "lr_scheduler", "profiler")
COMPONENTS = REQUIRED_COMPONENTS + TEACHER_COMPONENTS + OPTIONAL_COMPONENTS
TEACHER_HEADS = ("float8",)  # what `teacher_head` may name; null leaves the head as it is
TEACHER_WEIGHTS = ("nf4", "int8")  # what `teacher_weights` may name; null leaves them in `dtype`
DISTRIBUTED_ONLY = (
    "custom_sharded_layers",
    "data_parallel_replicate_dim",
    "data_parallel_shard_dim",
    "fsdp_cpu_offload",
    "fsdp_reshard_after_forward",
    "process_group_timeout",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The plain values of a config. Names and meanings are torchtune's where it has them."""

    output_dir: str
    device: str = "cuda"
    dtype: str = "bf16"  # fp32 or bf16
    seed: int | None = None
    cudnn_deterministic_mode: int | str | None = None
    # data
    batch_size: int = 1  # sequences per microbatch and process
    batch_size_val: int | None = None  # batch_size if unset
    shuffle: bool = True
    # objective
    kd_ratio: float = 0.5  # weight of the distillation term; 0 runs no teacher, 1 computes no cross-entropy
    # training
    epochs: int = 1
    max_steps_per_epoch: int | None = None
    # minutes after which the run ends as if its epochs were done, loading and last validation included; the schedule is
    # stretched or shortened so that it ends then; never fewer than 5 steps
    max_minutes: float | None = None
    gradient_accumulation_steps: int = 1  # microbatches per optimizer step
    clip_grad_norm: float | str | None = None
    compile: bool = False
    enable_activation_checkpointing: bool = False
    enable_activation_offloading: bool = False
    # validation: before the first step, every n steps, and after the last; needs dataset_val
    run_val_every_n_steps: int | None = None
    max_val_batches: int | None = None
    # a non-finite loss or gradient skips the step; so many in a row end the run
    max_skipped_steps: int = 5
    # checkpoints to go on with: step_<n>, written after every n-th step and on SIGTERM, SIGINT, SIGUSR1
    save_every_n_steps: int | None = None
    keep_last_n: int = 2
    keep_best: str | None = None  # a validation metric, for example val_kl; the best so far is kept besides
    enable_async_checkpointing: bool = False  # write while training goes on, from a copy in host memory
    resume_from_checkpoint: bool = False  # go on with the newest whole one; without any, begin at the beginning
    resume_despite_changes: bool = False  # of teacher, tokenizer, data, loss, optimizer or length of the run
    # weights at the end of each epoch: epoch_<n>
    save_adapter_weights_only: bool = False
    overwrite_output_dir: bool = False
    low_cpu_ram: bool = False
    # models whose checkpointer is null get random weights of their true shapes: benchmarks, does it fit
    random_weights: bool = False
    # logging
    log_every_n_steps: int = 1
    log_peak_memory_stats: bool = False
    # kd_distributed alone
    custom_sharded_layers: list[str] | None = None
    # hybrid sharding: copies of the weights (usually one per node), and processes that share a copy (-1: the rest)
    data_parallel_replicate_dim: int = 1
    data_parallel_shard_dim: int = -1
    fsdp_cpu_offload: bool = False
    fsdp_reshard_after_forward: bool = True
    # seconds that a process waits for another within a step before it ends; more than the longest step takes
    process_group_timeout: int = 50

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return training.get_dtype(self.dtype, device=self.torch_device)

    @property
    def uses_teacher(self) -> bool:
        return self.kd_ratio > 0


# what the recipes read
KEYS = (
    *(field.name for field in dataclasses.fields(Settings)),
    *COMPONENTS,
    "teacher_head",
    "teacher_weights",
    "teacher_cache",
    "teacher_tail",
    "teachers",
    "ensemble",
)


def read_settings(written: DictConfig, *, distributed: bool) -> Settings:
    """Check the keys of a config, and return its plain values.

    Args:
        written (DictConfig): the parsed config of a run.
        distributed (bool): whether several processes may take part; their keys are errors elsewhere.

    Raises:
        UserError: naming the first key that is unknown, missing, or has a value that cannot be.
    """
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    known = [name for name in KEYS if distributed or name not in DISTRIBUTED_ONLY]
    for key in written:
        if key in known or key in interpolated_names(written):
            continue
        if key == "loss":
            raise UserError(
                "Expected `kd_loss` alone, but the config also has `loss`: the cross-entropy on hard labels is "
                "part of the same pass here, weighted by 1 - kd_ratio, so delete the `loss` section."
            )
        if key in DISTRIBUTED_ONLY:
            raise UserError(
                f"The key `{key}` belongs to kd_distributed: start several processes by `tune run --nproc_per_node N "
                "torchtune_kd/kd_distributed --config ...`, or delete it."
            )
        raise UserError(f"Unknown key `{key}` in the config: {nearest(str(key), known)}")
    values = {}
    for name, field in fields.items():
        if name in written and (distributed or name not in DISTRIBUTED_ONLY):
            values[name] = typed(name, written[name], field.type)
        elif field.default is dataclasses.MISSING:
            raise UserError(f"Expected the key `{name}` in the config, but it is missing: add it.")
    settings = Settings(**values)
    _check_values(settings, written)
    return settings


def _check_values(settings: Settings, written: DictConfig) -> None:
    def expect(name: str, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"Expected `{name}` to be {expected}, got {getattr(settings, name)}: change it.")

    expect("kd_ratio", 0 <= settings.kd_ratio <= 1, "between 0 and 1")
    expect("seed", settings.seed is None or 0 <= settings.seed < 2**32, "from 0 to 4294967295, or null")
    modes = ("default", "warn", "error", 0, 1, 2)
    mode = settings.cudnn_deterministic_mode
    expect("cudnn_deterministic_mode", mode is None or mode in modes, f"one of {', '.join(map(str, modes))} or null")
    expect("device", re.fullmatch(r"cpu|cuda(:\d+)?", settings.device) is not None, "cpu or cuda")
    expect("dtype", settings.dtype in ("fp32", "bf16"), "fp32 or bf16 (fp16 would need gradient scaling)")
    for name in (
        "batch_size",
        "epochs",
        "gradient_accumulation_steps",
        "log_every_n_steps",
        "data_parallel_replicate_dim",
        "keep_last_n",
        "max_skipped_steps",
        "process_group_timeout",
    ):
        expect(name, getattr(settings, name) >= 1, "at least 1")
    shard_dim = settings.data_parallel_shard_dim
    expect("data_parallel_shard_dim", shard_dim == -1 or shard_dim >= 1, "at least 1, or -1 for all the others")
    for name in (
        "batch_size_val",
        "max_steps_per_epoch",
        "max_val_batches",
        "run_val_every_n_steps",
        "save_every_n_steps",
    ):
        expect(name, getattr(settings, name) is None or getattr(settings, name) >= 1, "at least 1 or null")
    if settings.max_minutes is not None:
        expect("max_minutes", 0 < settings.max_minutes < math.inf, "a number above 0 or null")
    if settings.clip_grad_norm is not None:
        expect("clip_grad_norm", _positive(settings.clip_grad_norm), "a number above 0 or null")
    if settings.dtype == "bf16" and settings.torch_device.type == "cuda" and torch.cuda.is_available():
        expect(
            "dtype",
            torch.cuda.is_bf16_supported(including_emulation=False),
            f"fp32 on {torch.cuda.get_device_name()}, which has no bf16",
        )
    for name in ("run_val_every_n_steps", "max_val_batches", "batch_size_val", "keep_best"):
        if getattr(settings, name) is not None and written.get("dataset_val") is None:
            raise UserError(f"`{name}` is set, but there is no `dataset_val`: add it or remove the key.")
    if settings.resume_despite_changes and not settings.resume_from_checkpoint:
        raise UserError(
            "`resume_despite_changes: True` has no use without `resume_from_checkpoint: True`: set both, or neither."
        )
    if settings.fsdp_cpu_offload and settings.torch_device.type == "cpu":
        raise UserError(
            "`fsdp_cpu_offload: True` moves shards from GPU to host memory, but `device` is cpu: set it to False."
        )
    if settings.enable_activation_offloading and settings.torch_device.type != "cuda":
        raise UserError(
            f"`enable_activation_offloading: True` moves activations from GPU to host memory, but `device` is "
            f"{settings.device}: set it to False."
        )
    if settings.enable_activation_offloading and not settings.enable_activation_checkpointing:
        raise UserError(
            "`enable_activation_offloading: True` works together with `enable_activation_checkpointing: True` "
            "only: set both."
        )


def _positive(value: float | str) -> bool:
    try:
        return float(value) > 0 and not math.isnan(float(value))
    except ValueError:
        return False


def typed(name: str, value: Any, type_: Any) -> Any:
    """Return ``value`` if it is of the field's type (int counts as float); else raise an error that names the key."""
    if isinstance(value, ListConfig):
        value = OmegaConf.to_container(value)
    options = getattr(type_, "__args__", (type_,))
    if list[str] in options or type_ == list[str] | None:
        good = value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    elif isinstance(value, bool):
        good = bool in options
    else:
        good = isinstance(value, options) or (float in options and isinstance(value, int))
    if not good:
        names = " or ".join("null" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
        raise UserError(f"Expected `{name}` to be {names}, got {value!r}: change it.")
    return value


def interpolated_names(written: DictConfig | ListConfig) -> set[str]:
    """Return the top-level names that another key reads as ``${name}`` or ``${name.inner}``."""
    raw = OmegaConf.to_yaml(written, resolve=False)
    return {match.split(".")[0] for match in re.findall(r"\$\{\s*([A-Za-z_][\w.]*)", raw)}
