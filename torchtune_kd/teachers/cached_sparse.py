"""A teacher of which some log-probabilities of each token were written to disk.

Shapes: n valid tokens, k stored ids.
"""

import math

import torch

from torchtune_kd.caches.layout import CacheManifest
from torchtune_kd.config.metrics import WITHOUT_ENTROPY
from torchtune_kd.config.reading import Config
from torchtune_kd.data.batches import Batch
from torchtune_kd.errors import UserError, phase
from torchtune_kd.kernels import Objective
from torchtune_kd.losses.signals import Sparse
from torchtune_kd.teachers.base import Unchanging
from torchtune_kd.teachers.read_ahead import ReadAhead, Reader

RENORMALISE = "renormalise"


class SparseTeacher(Unchanging):
    """Give stored log-probabilities.

    Args:
        reader (Reader): of a cache.
        manifest (CacheManifest): what it holds.
        temperature (float): of the run, at which the tail is wanted.
        ignore_index (int): label of the tokens that do not count.
        device (torch.device): where signals go.
        renormalise (bool): leave the tails out, so that the stored ids stand for the whole teacher.
    """

    def __init__(
        self,
        reader: Reader,
        manifest: CacheManifest,
        temperature: float,
        *,
        ignore_index: int,
        device: torch.device,
        renormalise: bool = False,
    ) -> None:
        self._ahead = ReadAhead(reader, ignore_index, device)
        self._sampled, self._samples, self._device = manifest.kind == "sampled", manifest.samples, device
        self._tails = [None if renormalise else tail_at(manifest, each) for each in (temperature, 1.0)]

    def expect(self, batch: Batch) -> None:
        """Begin to read what a batch, still on the host, will ask for."""
        self._ahead.expect(batch)

    def signal(self, batch: Batch) -> Sparse:
        """Return the stored ids of the valid tokens, their log-probabilities, and the mass of the rest."""
        with phase("teacher"):
            _, columns = self._ahead.take(batch)
            if not columns:
                none = torch.zeros(0, device=self._device)
                tail, tail_at_1 = (None if index is None else none for index in self._tails)
                return Sparse(none.long().view(0, 1), none.view(0, 1), tail, tail_at_1, none, self._sampled)
            if self._sampled:
                counts = columns["counts"].float()
                return Sparse(
                    columns["ids"], (counts / self._samples).log(), None, None, columns["entropy"], sampled=True
                )
            tail, tail_at_1 = (None if index is None else columns["tail"][:, index] for index in self._tails)
            entropy = columns.get("entropy")
            return Sparse(columns["ids"], columns["log_probs"].float(), tail, tail_at_1, entropy, sampled=False)

    def close(self) -> None:
        """Let the threads read nothing more."""
        self._ahead.close()


def tail_at(manifest: CacheManifest, temperature: float) -> int | None:
    """Return which of the stored tails is that at a temperature; None if none is."""
    close = (at for at, stored in enumerate(manifest.temperatures) if math.isclose(stored, temperature))
    return next(close, None)


def signal_of(config: Config, manifest: CacheManifest) -> str:
    """Return what :class:`~torchtune_kd.config.reading.Config` calls the signal of a cache."""
    without_mass = config.teacher_tail == RENORMALISE or tail_at(manifest, 1.0) is None
    signal = "top_k_alone" if manifest.kind == "top_k" and without_mass else manifest.kind
    return signal if manifest.has_entropy else f"{signal}{WITHOUT_ENTROPY}"


def check_sparse_cache(config: Config, manifest: CacheManifest) -> None:
    """Refuse a run whose loss is not well defined on what a cache holds.

    Raises:
        UserError: for a temperature at which no tail is stored, drawn ids with another loss than forward KL at T = 1,
            ids without a tail that the config does not accept, or a ``teacher_head`` where no head is needed.
    """
    loss = config.kd_loss.build()
    if config.teacher_head is not None and manifest.kind != "hidden":
        raise UserError(
            f"`teacher_head: {config.teacher_head}` needs hidden states, but the cache in {config.teacher_cache} holds "
            f"{manifest.stored}: delete that key."
        )
    tail = config.teacher_tail
    if manifest.kind != "top_k" and tail is not None:
        raise UserError(
            f"`teacher_tail: {tail}` is for caches of the likeliest ids, but {config.teacher_cache} holds "
            f"{manifest.stored}: delete that key."
        )
    if manifest.kind == "sampled" and (loss.divergence != "forward_kl" or loss.temperature != 1.0):
        raise UserError(
            f"The cache in {config.teacher_cache} holds ids drawn from the teacher, against which only forward KL at "
            f"temperature 1 is unbiased, but `kd_loss` is {config.kd_loss.component} at {loss.temperature:g}: write "
            "torchtune_kd.losses.ForwardKLLoss and `kd_loss.temperature: 1.0`, or use a cache of hidden states."
        )
    if manifest.kind != "top_k":
        return
    if tail == RENORMALISE:
        if Objective(**loss.settings()).computed_divergence in ("reverse_kl", "symmetric_kl"):
            raise UserError(
                f"`kd_loss` ({config.kd_loss.component}) needs the mass of the rest, since it is infinite where the "
                "teacher has none: use a cache with this temperature's, or another loss."
            )
        return
    if tail_at(manifest, loss.temperature) is None:
        stored = ", ".join(f"{temperature:g}" for temperature in manifest.temperatures) or "none"
        raise UserError(
            f"The cache in {config.teacher_cache} holds the mass of the ids that it leaves out at these temperatures: "
            f"{stored}, but `kd_loss.temperature` is {loss.temperature:g}, to which it does not follow: write the "
            f"cache with this one under `cache.temperatures`, or accept the error with `teacher_tail: {RENORMALISE}`."
        )
