"""The steps that the recipes share: settings and checks, data, teacher and student, the optimizer step, metrics,
validation and checkpoints."""

from torchtune_kd._versions import check_versions
from torchtune_kd._warnings import silence_known_warnings

check_versions()  # before torchtune is imported: its own failure with a wrong torchao says nothing
silence_known_warnings()  # before torchao is imported, also where PyTorch loads no plug-ins

from torchtune_kd.training.command import command
from torchtune_kd.training.data import build_loaders, microbatches
from torchtune_kd.training.errors import RunError, Stopped, UserError, one_sentence, said_before_cleanup
from torchtune_kd.training.evaluate import evaluate
from torchtune_kd.training.loading import load_weights
from torchtune_kd.training.metrics import validation_metrics
from torchtune_kd.training.models import HostTensor, Student, Teacher, build_student, build_teacher
from torchtune_kd.training.run import (
    Run,
    checkpoint_if_due,
    optimizer_step,
    save,
    set_up,
    steps,
    validate_if_due,
)
from torchtune_kd.training.settings import Settings, build, build_kd_loss, read_settings
from torchtune_kd.training.step import accumulate_gradients, gradient_norm
from torchtune_kd.training.world import World, join_process_group, leave_process_group, single_process

__all__ = [
    "HostTensor",
    "Run",
    "RunError",
    "Settings",
    "Stopped",
    "Student",
    "Teacher",
    "UserError",
    "World",
    "accumulate_gradients",
    "build",
    "build_kd_loss",
    "build_loaders",
    "build_student",
    "build_teacher",
    "checkpoint_if_due",
    "command",
    "evaluate",
    "gradient_norm",
    "join_process_group",
    "leave_process_group",
    "load_weights",
    "microbatches",
    "one_sentence",
    "optimizer_step",
    "read_settings",
    "said_before_cleanup",
    "save",
    "set_up",
    "single_process",
    "steps",
    "validate_if_due",
    "validation_metrics",
]
