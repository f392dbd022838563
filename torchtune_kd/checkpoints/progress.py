"""Where a run stands between two optimizer steps: the numbers that are the same on every process."""

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class Progress:
    """Counted over all processes, so that a run can go on with another number of them.

    ``samples`` is the data position: the first so many of this epoch's order are consumed, by whichever process.
    """

    global_step: int = 0  # optimizer steps of the run, skipped ones included
    epoch: int = 0
    step_in_epoch: int = 0
    samples: int = 0  # of this epoch
    tokens: int = 0  # valid tokens of the run
    seconds: float = 0.0  # that a run with max_minutes took; those of rank 0
    skipped_steps: int = 0  # steps without a finite loss and gradient
    skipped_in_a_row: int = 0
    best: float | None = None  # the best value so far of the metric that keep_best names
    validation_pending: bool = True  # validation is due before the next step

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def differences(cls, saved: dict[str, Any]) -> list[str]:
        """Say how another version's :meth:`to_dict` differs from this one's: "without <field>", "with <field>"."""
        ours = {field.name for field in fields(cls)}
        return [
            *(f"without {name}" for name in sorted(ours - saved.keys())),
            *(f"with {name}" for name in sorted(saved.keys() - ours)),
        ]
