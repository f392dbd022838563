"""Several teachers as one: the mean of their probabilities, or of their logits."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from torchtune_kd.data.batches import Batch
from torchtune_kd.losses.signals import Hidden
from torchtune_kd.teachers.base import Teacher


class Several:
    """Hold teachers that are asked together.

    Args:
        members (Sequence[Teacher]): the teachers.
    """

    def __init__(self, members: Sequence[Teacher]) -> None:
        self.members = tuple(members)

    def end_step(self, student: nn.Module) -> None:
        """Let each give back what it no longer needs."""
        for member in self.members:
            member.end_step(student)

    def after_update(self, student: nn.Module) -> None:
        """Let each follow the student."""
        for member in self.members:
            member.after_update(student)

    def kept_state(self) -> Mapping[str, Tensor]:
        """Return what changes while the student trains: of one member at most."""
        return {name: tensor for member in self.members for name, tensor in member.kept_state().items()}

    def close(self) -> None:
        """Close each."""
        for member in self.members:
            member.close()


class Ensemble(Several):
    """Join the signals of several teachers.

    With "probabilities" it is a teacher with p = Σ w_m p_m at T = 1, which T softens as it softens any teacher's; with
    "logits" one with z = Σ w_m z_m, whatever T. Members may have widths and paddings of their own.

    Args:
        members (Sequence[Teacher]): each gives hidden states.
        shares (Sequence[float]): w, which add up to 1.
        mix (str): "probabilities" or "logits".
    """

    def __init__(self, members: Sequence[Teacher], shares: Sequence[float], mix: str) -> None:
        super().__init__(members)
        self._shares, self._mix = tuple(shares), mix

    def expect(self, batch: Batch) -> None:
        """Let each prepare for a batch."""
        for member in self.members:
            member.expect(batch)

    def signal(self, batch: Batch) -> Hidden:
        """Return the states and heads of all."""
        signals = [member.signal(batch) for member in self.members]
        states = tuple(state for signal in signals for state in signal.states)
        heads = tuple(head for signal in signals for head in signal.heads)
        return Hidden(states, heads, self._shares, self._mix)
