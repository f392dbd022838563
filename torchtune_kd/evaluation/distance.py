"""Before and after: numbers of the run, and what they allow to say."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torchtune_kd.reports.statistics import perplexity


@dataclass(frozen=True)
class Distance:
    """Hold how far a student is from its teacher, and both from the text; means per token of the held-out text.

    Attributes:
        loss (float): Next-token loss of the student, nats.
        teacher_loss (float): Next-token loss of the teacher, nats.
        kl (float): KL(teacher ‖ student) at temperature 1, nats.
        top1_agreement (float): Share of tokens for which both find the same next token most likely.
        acceptance_rate (float): Σ min(p, q): expected share of the student's proposals that speculative decoding
            with this teacher accepts.
    """

    loss: float
    teacher_loss: float
    kl: float
    top1_agreement: float
    acceptance_rate: float

    @classmethod
    def from_validation(cls, record: Mapping[str, float]) -> "Distance":
        """Take the figures from a validation that the recipe logged."""
        return cls(
            loss=record["val_class_loss"],
            teacher_loss=record["val_teacher_class_loss"],
            kl=record["val_kl"],
            top1_agreement=record["val_top1_agreement"],
            acceptance_rate=record["val_acceptance_rate"],
        )

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def teacher_perplexity(self) -> float:
        return perplexity(self.teacher_loss)

    def to_dict(self) -> dict[str, float]:
        return asdict(self) | {"perplexity": self.perplexity, "teacher_perplexity": self.teacher_perplexity}


def closing(before: Distance, after: Distance, teacher_speed: float, student_speed: float) -> list[str]:
    """Say in sentences what the numbers say, whichever way they fell.

    Numbers are compared as they are printed: a change that the printed digits do not show is none.
    """
    if _rounded(after.kl) < _rounded(before.kl):
        kl = (
            f"The student's KL to its teacher on held-out text fell from {before.kl:.3g} to {after.kl:.3g} nats per "
            "token."
        )
    else:
        kl = (
            "The student's KL to its teacher on held-out text did not fall: "
            f"{before.kl:.3g} nats per token before training, {after.kl:.3g} after."
        )
    if round(after.top1_agreement, 2) > round(before.top1_agreement, 2):
        top1 = (
            f"Student and teacher find the same next token most likely at {after.top1_agreement:.0%} of the places, "
            f"{before.top1_agreement:.0%} before training."
        )
    else:
        top1 = (
            "Their agreement on the most likely next token did not rise: "
            f"{before.top1_agreement:.0%} before training, {after.top1_agreement:.0%} after."
        )
    ratio = round(student_speed / teacher_speed, 1)
    if ratio > 1:
        speed = f"It generates {ratio:.1f} times as many tokens per second"
    else:
        speed = "It does not generate faster than its teacher here"
    return [kl, top1, f"{speed} ({student_speed:.0f}, the teacher {teacher_speed:.0f})."]


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
