"""The names of what is logged of a step and of a validation, and which end of each is the better one.

Of a teacher of which some log-probabilities are stored there are bounds, which bear other names: ``kl_cells`` and
``teacher_class_loss_cells`` from below, ``acceptance_rate_cells`` from above. Without the mass of the rest at T = 1,
and of ids that were drawn, there are none.
"""

from collections.abc import Iterable

from torchtune_kd.config.reading import Config
from torchtune_kd.errors import UserError

DISTANCES = ("kl", "top1_agreement", "student_entropy", "teacher_entropy", "acceptance_rate")
WITHOUT_ENTROPY = "_without_entropy"  # ends the signal of a cache that does not hold the teacher's entropy

_BOUNDED = ("kl", "acceptance_rate", "teacher_class_loss")


def training_metrics(config: Config) -> tuple[str, ...]:
    """Return what is logged of a training step: no cross-entropy at kd_ratio 1, no distances without a teacher."""
    if not config.settings.uses_teacher:
        return ("class_loss", "student_entropy")
    names = ("class_loss", "kd_loss", *DISTANCES) if config.settings.kd_ratio < 1 else ("kd_loss", *DISTANCES)
    return tuple(_defined(names, config))


def validation_metrics(config: Config) -> tuple[str, ...]:
    """Return what is logged of a validation."""
    if not config.settings.uses_teacher:
        return ("class_loss", "student_entropy")
    return tuple(_defined(("class_loss", "teacher_class_loss", "kd_loss", *DISTANCES), config))


def _defined(names: Iterable[str], config: Config) -> Iterable[str]:
    """Yield the names of what the config's signal defines."""
    signal = config.signal.removesuffix(WITHOUT_ENTROPY)
    for name in names:
        if name == "teacher_entropy" and signal != config.signal:
            continue
        if signal == "hidden":
            yield name
        elif signal == "top_k":
            yield f"{name}_cells" if name in _BOUNDED else name
        elif name not in _BOUNDED and (name != "top1_agreement" or signal == "top_k_alone"):
            yield name


def lower_is_better(config: Config, metric: str) -> bool:
    """Return whether a lower value of the validation metric ``metric`` (``keep_best``) is the better one.

    Raises:
        UserError: if no validation of this run logs ``metric``, or neither end of it is better.
    """
    names = [f"val_{name}" for name in ("loss", *validation_metrics(config)) if not name.endswith("entropy")]
    names = [name for name in names if not name.startswith("val_teacher_class_loss")]  # the student does not change it
    if metric not in names:
        raise UserError(f"Expected `keep_best` to be null or one of {', '.join(names)}, got {metric}: change it.")
    return metric.removeprefix("val_") not in ("top1_agreement", "acceptance_rate", "acceptance_rate_cells")
