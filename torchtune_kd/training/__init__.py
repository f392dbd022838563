"""The steps that the recipes share: settings and checks, data, teacher and student, the optimizer step, metrics,
validation and checkpoints."""

from torchtune_kd._versions import check_versions
from torchtune_kd._warnings import silence_known_warnings

check_versions()  # before torchtune is imported: its own failure with a wrong torchao says nothing
silence_known_warnings()  # before torchao is imported, also where PyTorch loads no plug-ins

from torchtune_kd.config.command import command
from torchtune_kd.config.components import build, build_kd_loss
from torchtune_kd.config.metrics import validation_metrics
from torchtune_kd.config.settings import Settings, read_settings
from torchtune_kd.data.steps import build_loaders, microbatches
from torchtune_kd.distributed.world import World, join_process_group, leave_process_group, single_process
from torchtune_kd.errors import RunError, Stopped, UserError, exit_with_message, report_errors
from torchtune_kd.models.build import build_student
from torchtune_kd.models.loading import load_weights
from torchtune_kd.models.student import HostTensor, Student
from torchtune_kd.teachers.live import Teacher, build_teacher
from torchtune_kd.training.evaluate import evaluate, validate_if_due
from torchtune_kd.training.run import Run, steps
from torchtune_kd.training.save import checkpoint_if_due, save
from torchtune_kd.training.setup import set_up
from torchtune_kd.training.step import accumulate_gradients, gradient_norm, optimizer_step

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
    "exit_with_message",
    "gradient_norm",
    "join_process_group",
    "leave_process_group",
    "load_weights",
    "microbatches",
    "optimizer_step",
    "read_settings",
    "report_errors",
    "save",
    "set_up",
    "single_process",
    "steps",
    "validate_if_due",
    "validation_metrics",
]
