"""Figures with their errors, and what they say about the claims of the paper."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .digits import TEST_IMAGES, TRAINING_IMAGES

VERDICTS = {
    "reproduced": "Reproduced",
    "open": "Not shown either way",
    "opposite": "Not reproduced, the opposite was found",
}
Cell = Tensor | str  # one value for each seed, or what stands there as it is


@dataclass(frozen=True)
class Table:
    """Rows of cells under their names.

    Attributes:
        title (str): above the table.
        corner (str): what the names of the rows are.
        rows (Mapping[str, Mapping[str, Cell]]): cells by row and column, the same columns in each.
        differences (Sequence[str]): the columns that are written with a sign.
    """

    title: str
    corner: str
    rows: Mapping[str, Mapping[str, Cell]]
    differences: Sequence[str] = ()

    def markdown(self) -> str:
        """Write each cell as mean ± standard error over the seeds."""
        columns = list(next(iter(self.rows.values())))
        lines = [[self.corner, *columns]]
        lines += [
            [name, *(as_text(row[column], "+" if column in self.differences else "") for column in columns)]
            for name, row in self.rows.items()
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        table = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
        return "\n".join([f"{self.title}:", "", *table])


@dataclass(frozen=True)
class Claim:
    """A claim of the paper as a difference that is below 0, or above 0, where it holds.

    Attributes:
        paper (str): where it stands.
        text (str): the claim for these experiments, as a clause.
        values (Tensor): the difference of each seed, in percentage points.
        expected (int): -1 or 1, the sign of the difference if the claim holds.
    """

    paper: str
    text: str
    values: Tensor
    expected: int = -1

    def verdict(self, widening: float = 1.0) -> str:
        """Return "reproduced" or "opposite" where the interval leaves out 0, else "open"."""
        low, high = interval(self.values, widening)
        if low <= 0 <= high:
            return "open"
        return "reproduced" if self.expected * low > 0 else "opposite"

    def sentence(self) -> str:
        """Say which way the comparison fell."""
        low, high = interval(self.values)
        figures = f"{self.values.mean():+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}"
        return f"{VERDICTS[self.verdict()]}: {self.text} ({figures}; paper: {self.paper})."


@dataclass(frozen=True)
class Findings:
    """Hold what an experiment found.

    Attributes:
        title (str): of the experiment.
        tables (Sequence[Table]): its figures.
        claims (Sequence[Claim]): what they were compared for.
    """

    title: str
    tables: Sequence[Table]
    claims: Sequence[Claim]

    def markdown(self) -> str:
        """Write tables, then sentences."""
        sentences = "\n".join(f"- {claim.sentence()}" for claim in self.claims)
        return "\n\n".join([f"## {self.title}", *(table.markdown() for table in self.tables), sentences])

    def as_dict(self) -> dict[str, Any]:
        """Return every figure, of each seed too, as JSON can hold them."""
        return {
            "title": self.title,
            "tables": [
                {
                    "title": table.title,
                    "rows": {
                        name: {
                            column: cell if isinstance(cell, str) else _figures(cell) for column, cell in row.items()
                        }
                        for name, row in table.rows.items()
                    },
                }
                for table in self.tables
            ],
            "claims": [
                {
                    "claim": claim.text,
                    "paper": claim.paper,
                    "expected_sign": claim.expected,
                    **_figures(claim.values),
                    "interval_95": interval(claim.values),
                    "verdict": claim.verdict(),
                    "verdict_if_widened": claim.verdict(widening(len(claim.values))),
                }
                for claim in self.claims
            ],
        }


def summary(claims: Sequence[Claim]) -> str:
    """Say which claims were reproduced, which were not, and how far the intervals can be trusted."""
    paragraphs = ["## What reproduces, and what does not"]
    for verdict, said in VERDICTS.items():
        texts = [f"- {claim.text}" for claim in claims if claim.verdict() == verdict]
        paragraphs.append("\n".join([f"{said} ({len(texts)} of {len(claims)}):", "", *(texts or ["- none"])]))
    firm = [claim for claim in claims if claim.verdict(widening(len(claim.values))) == "reproduced"]
    paragraphs.append(
        '"Reproduced" means that the 95 % interval of the paired differences leaves out 0, on the side that the paper '
        "says. One such interval in twenty misses by chance. The splits share images, so that the intervals are about "
        "other splits of these images; for other images Nadeau and Bengio (2003) widen them, with which "
        f"{len(firm)} of the claims are still reproduced{':' if firm else '.'}"
    )
    return "\n\n".join([*paragraphs, *(["\n".join(f"- {claim.text}" for claim in firm)] if firm else [])])


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean over seeds and its standard error."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def interval(values: Tensor, widening: float = 1.0) -> tuple[float, float]:
    """Return the 95 % interval of the mean by Student's t, of paired differences if that is what the values are."""
    from scipy.special import stdtrit

    mean, standard_error = mean_and_error(values)
    reach = float(stdtrit(len(values) - 1, 0.975)) * standard_error * widening
    return mean - reach, mean + reach


def widening(seeds: int) -> float:
    """Return how much wider intervals are that count what random splits have in common (Nadeau and Bengio, 2003)."""
    return math.sqrt(1 + seeds * TEST_IMAGES / TRAINING_IMAGES)


def _figures(values: Tensor) -> dict[str, Any]:
    mean, standard_error = mean_and_error(values)
    return {"mean": mean, "standard_error": standard_error, "seeds": values.tolist()}


def as_text(cell: Cell, sign: str = "") -> str:
    """Write mean ± standard error; with "+" as sign both signs of the mean are written."""
    if isinstance(cell, str):
        return cell
    mean, standard_error = mean_and_error(cell)
    larger = max(abs(mean), standard_error)
    digits = 1 - math.floor(math.log10(larger)) if 0 < larger < 0.05 else 2  # two figures of what is very small
    return f"{mean:{sign}.{digits}f} ± {standard_error:.{digits}f}"
