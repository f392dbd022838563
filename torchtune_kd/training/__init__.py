"""What a recipe is written with: the config, the run, its steps, validation, checkpoints and exports."""

from torchtune_kd._torchtune import prepare_import

prepare_import()

from torchtune_kd.config.command import command
from torchtune_kd.config.metrics import validation_metrics
from torchtune_kd.config.reading import Config, read_config
from torchtune_kd.config.settings import Settings
from torchtune_kd.data.batches import Batch
from torchtune_kd.distributed.world import World, join_world, leave_process_group
from torchtune_kd.errors import RunError, Stopped, UserError, exit_with_message, report_errors
from torchtune_kd.training.evaluate import evaluate, validate_if_due
from torchtune_kd.training.run import Run, steps
from torchtune_kd.training.running import running
from torchtune_kd.training.save import checkpoint_if_due, export_epoch
from torchtune_kd.training.setup import set_up
from torchtune_kd.training.step import Step, begin_step, finish_step

__all__ = [
    "Batch",
    "Config",
    "Run",
    "RunError",
    "Settings",
    "Step",
    "Stopped",
    "UserError",
    "World",
    "begin_step",
    "checkpoint_if_due",
    "command",
    "evaluate",
    "exit_with_message",
    "export_epoch",
    "finish_step",
    "join_world",
    "leave_process_group",
    "read_config",
    "report_errors",
    "running",
    "set_up",
    "steps",
    "validate_if_due",
    "validation_metrics",
]
