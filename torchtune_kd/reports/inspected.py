"""Hold what two models expect at every token of a text: the figures of the inspection page.

The *reference* is usually the teacher. KL is KL(reference ‖ student) at temperature 1, in nats.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchtune_kd.reports.statistics import perplexity


@dataclass(frozen=True)
class Guess:
    """Hold what one model expects at a token.

    Attributes:
        loss (float): -log of the probability of the token that the text has, nats.
        likeliest (Sequence[tuple[int, float]]): ids and their probabilities, the largest first.
    """

    loss: float
    likeliest: Sequence[tuple[int, float]]

    @property
    def probability(self) -> float:
        return math.exp(-self.loss)


@dataclass(frozen=True)
class Prediction:
    """Hold what both models expect at a token, and how far apart they are."""

    kl: float
    student: Guess
    reference: Guess

    @property
    def agrees(self) -> bool:
        """Return whether both find the same token most likely."""
        return self.student.likeliest[0][0] == self.reference.likeliest[0][0]


@dataclass(frozen=True)
class Token:
    """A token of the text.

    Attributes:
        id (int): in the vocabulary.
        text (str): what it writes; empty within a character of several tokens, of which the first writes all of it.
        context (int): tokens that it is predicted from.
        prediction (Prediction | None): None for a token that nothing stands before.
    """

    id: int
    text: str
    context: int
    prediction: Prediction | None


@dataclass(frozen=True)
class Model:
    """A model that took part: its name and where its weights are."""

    name: str
    folder: str


@dataclass(frozen=True)
class Inspection:
    """A text, token by token.

    Attributes:
        text (str): name of the text.
        student (Model): the model inspected.
        reference (Model): the model that it is measured against.
        tokens (Sequence[Token]): the text.
        pieces (Mapping[int, str]): what the ids of ``likeliest`` write.
        windows (Sequence[int]): places in ``tokens`` from which on a further window is read, see ``overlap``.
        overlap (int): tokens that a window begins before its place, at least: the least context of a token after the
            first window.
    """

    text: str
    student: Model
    reference: Model
    tokens: Sequence[Token]
    pieces: Mapping[int, str]
    windows: Sequence[int]
    overlap: int

    @property
    def predictions(self) -> list[Prediction]:
        return [token.prediction for token in self.tokens if token.prediction is not None]

    @property
    def kl(self) -> float:
        """Return the mean over the predicted tokens."""
        return _mean([prediction.kl for prediction in self.predictions])

    @property
    def agreement(self) -> float:
        """Return the share of predicted tokens at which both models find the same token most likely."""
        return _mean([float(prediction.agrees) for prediction in self.predictions])

    @property
    def student_perplexity(self) -> float:
        return perplexity(_mean([prediction.student.loss for prediction in self.predictions]))

    @property
    def reference_perplexity(self) -> float:
        return perplexity(_mean([prediction.reference.loss for prediction in self.predictions]))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
