"""Several teachers, each for the rows of some of the datasets."""

from collections.abc import Sequence

from torch import Tensor

from torchtune_kd.data.batches import Batch
from torchtune_kd.losses.signals import ByRow
from torchtune_kd.teachers.base import Teacher
from torchtune_kd.teachers.ensemble import Several


class Specialists(Several):
    """Ask each teacher about its rows alone.

    One without a row in a batch is given a row without a label, since its weights may be sharded over processes that
    have rows for it.

    Args:
        members (Sequence[Teacher]): the teachers.
        datasets (Sequence[Sequence[int]]): of each, the positions of its datasets in the config.
        ignore_index (int): label of the tokens that do not count.
    """

    def __init__(self, members: Sequence[Teacher], datasets: Sequence[Sequence[int]], ignore_index: int) -> None:
        super().__init__(members)
        self._ignore_index = ignore_index
        self._datasets = tuple(frozenset(positions) for positions in datasets)
        self._expected: list[tuple[Tensor, list[Batch]]] = []  # labels of a batch, by which it is known; its parts

    def expect(self, batch: Batch) -> None:
        """Let each prepare for its rows."""
        parts = [batch.rows(rows, self._ignore_index) for rows in self._rows(batch)]
        self._expected.append((batch.labels, parts))
        for member, part in zip(self.members, parts, strict=True):
            member.expect(part)

    def signal(self, batch: Batch) -> ByRow:
        """Return each teacher's signal for its rows."""
        while self._expected and self._expected[0][0] is not batch.labels:  # of a step that was given up
            del self._expected[0]
        if not self._expected:
            self.expect(batch)
        _, parts = self._expected.pop(0)
        device = batch.tokens.device
        signals = tuple(member.signal(part.to(device)) for member, part in zip(self.members, parts, strict=True))
        return ByRow(tuple(self._rows(batch)), signals)

    def _rows(self, batch: Batch) -> list[tuple[int, ...]]:
        parts = batch.parts or [0] * len(batch.labels)
        return [tuple(row for row, part in enumerate(parts) if part in datasets) for datasets in self._datasets]
