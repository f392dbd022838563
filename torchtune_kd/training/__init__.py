"""The steps that the recipes share: settings and checks, data, teacher and student, the optimizer step, metrics,
validation and checkpoints."""

from torchtune_kd._versions import check_versions

check_versions()  # before torchtune is imported: its own failure with a wrong torchao says nothing

from torchtune_kd.training.checkpoint import save_epoch
from torchtune_kd.training.data import build_loaders, microbatches, steps_per_epoch
from torchtune_kd.training.errors import UserError, one_sentence
from torchtune_kd.training.evaluate import evaluate, validation_due
from torchtune_kd.training.metrics import TrainingLog, validation_metrics
from torchtune_kd.training.models import Student, Teacher, build_student, build_teacher, load_weights
from torchtune_kd.training.optim import build_lr_scheduler, build_optimizer, build_profiler
from torchtune_kd.training.preflight import check_run
from torchtune_kd.training.settings import Settings, build, build_kd_loss, read_settings
from torchtune_kd.training.step import accumulate_gradients, gradient_norm
from torchtune_kd.training.world import World, join_process_group, leave_process_group, single_process

__all__ = [
    "Settings",
    "Student",
    "Teacher",
    "TrainingLog",
    "UserError",
    "World",
    "accumulate_gradients",
    "build",
    "build_kd_loss",
    "build_loaders",
    "build_lr_scheduler",
    "build_optimizer",
    "build_profiler",
    "build_student",
    "build_teacher",
    "check_run",
    "evaluate",
    "gradient_norm",
    "join_process_group",
    "leave_process_group",
    "load_weights",
    "microbatches",
    "one_sentence",
    "read_settings",
    "save_epoch",
    "single_process",
    "steps_per_epoch",
    "validation_due",
    "validation_metrics",
]
