"""The order of the samples, and the position in it."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from torchtune_kd.data.batches import Sample, check_ids
from torchtune_kd.data.datasets import Parts, read_row


class EachSampleOnce(StatefulDistributedSampler):
    """Deals out each epoch's order like cards, one sample to each process in turn.

    Where torch's distributed sampler would repeat samples to give every process as many, this one yields ``FILLER``.
    Its state is a position in the order, counted over all processes together: the samples before it were consumed by
    someone. So it can be loaded on another number of processes, and no sample is seen twice or left out.
    """

    position = 0  # where the next iteration begins

    def order(self) -> list[int]:
        """Return the indices of this epoch (``set_epoch``) in the order in which all processes consume them."""
        if not self.shuffle:
            return list(range(len(self.dataset)))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self.dataset), generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        for start in range(self.position, len(order), self.num_replicas):
            mine = start + self.rank
            yield order[mine] if mine < len(order) else FILLER

    def remaining(self) -> int:
        """Return how many samples this process has yet to yield in this epoch, the filler included."""
        return max(0, -(-(len(self.dataset) - self.position) // self.num_replicas))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.set_epoch(state_dict["epoch"])
        self.position = state_dict["position"]


class CheckedRows(Dataset):
    """``dataset`` with its ids checked, and at index ``FILLER`` a sample without a valid label."""

    def __init__(self, dataset: Dataset, name: str, vocab: int) -> None:
        self._dataset, self._name, self._vocab = dataset, name, vocab

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        if index != FILLER:
            sample = read_row(self._dataset, index, self._name)
            check_ids(sample, index, self._name, self._vocab)
            return {**sample, "part": self._dataset.part_of(index)} if isinstance(self._dataset, Parts) else sample
        sample = dict(read_row(self._dataset, 0, self._name))
        labels = sample["labels"]
        masked = torch.full((len(labels),), CROSS_ENTROPY_IGNORE_IDX)
        sample["labels"] = masked if isinstance(labels, Tensor) else masked.tolist()
        if isinstance(self._dataset, Parts):
            sample["part"] = 0
        return sample


FILLER = -1
