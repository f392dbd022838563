"""The names of what is logged of a step and of a validation, and which end of each is the better one."""

from torchtune_kd.config.settings import Settings
from torchtune_kd.errors import UserError

DISTANCES = ("kl", "top1_agreement", "student_entropy", "teacher_entropy", "acceptance_rate")


def training_metrics(settings: Settings) -> tuple[str, ...]:
    """Return what is logged of a training step: no cross-entropy at kd_ratio 1, no distances without a teacher."""
    if not settings.uses_teacher:
        return ("class_loss", "student_entropy")
    return ("class_loss", "kd_loss", *DISTANCES) if settings.kd_ratio < 1 else ("kd_loss", *DISTANCES)


def validation_metrics(settings: Settings) -> tuple[str, ...]:
    if not settings.uses_teacher:
        return ("class_loss", "student_entropy")
    return ("class_loss", "teacher_class_loss", "kd_loss", *DISTANCES)


def lower_is_better(settings: Settings, metric: str) -> bool:
    """Return whether a lower value of the validation metric ``metric`` (``keep_best``) is the better one.

    Raises:
        UserError: if no validation of this run logs ``metric``, or neither end of it is better.
    """
    names = [f"val_{name}" for name in ("loss", *validation_metrics(settings)) if not name.endswith("entropy")]
    names = [name for name in names if name != "val_teacher_class_loss"]  # the student does not change it
    if metric not in names:
        raise UserError(f"Expected `keep_best` to be null or one of {', '.join(names)}, got {metric}: change it.")
    return metric.removeprefix("val_") not in ("top1_agreement", "acceptance_rate")
