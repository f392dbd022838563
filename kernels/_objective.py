"""What is minimised: the settings of the objective and the checks they must pass."""

from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real

# Name -> default of ``beta``; None where the divergence has no such parameter.
DEFAULT_BETA = {
    "forward_kl": None,
    "reverse_kl": None,
    "symmetric_kl": 0.5,
    "jsd": 0.5,
    "skew_forward_kl": 0.1,
    "skew_reverse_kl": 0.1,
    "tvd": None,
}

DIVERGENCES = tuple(DEFAULT_BETA)

# Beyond them distributions are single ids or uniform; far beyond, logits/T and T² leave the range of fp32.
TEMPERATURES = (1e-3, 1e3)


@dataclass(frozen=True)
class Objective:
    r"""The loss of one token: :math:`(1-\alpha)\,\mathrm{CE} + \alpha\,T^2 D(p_T, q_T)`.

    Args:
        divergence (str): one of :data:`DIVERGENCES`.
        beta (float | None): parameter of the divergence; None takes its default.
        temperature (float): T in [0.001, 1000], divides both models' logits inside D.
        kd_ratio (float): α, weight of the divergence against the cross-entropy.
        ignore_index (int): label of the tokens that do not count.
        scale_by_temperature_squared (bool): multiply D by T².

    Raises:
        ValueError: if a setting is unknown or out of range.
    """

    divergence: str = "forward_kl"
    beta: float | None = None
    temperature: float = 1.0
    kd_ratio: float = 1.0
    ignore_index: int = -100
    scale_by_temperature_squared: bool = True

    def __post_init__(self) -> None:
        if self.divergence not in DEFAULT_BETA:
            near = get_close_matches(str(self.divergence), DIVERGENCES, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, but got {self.divergence!r}{hint}")
        default = DEFAULT_BETA[self.divergence]
        if self.beta is None:
            object.__setattr__(self, "beta", default)
        elif default is None:
            raise ValueError(f"{self.divergence} has no beta, but got beta={self.beta}; leave beta out")
        elif not (_is_number(self.beta) and 0.0 <= self.beta <= 1.0):
            raise ValueError(f"beta must be a number in [0, 1], but got {self.beta!r}")
        low, high = TEMPERATURES
        if not (_is_number(self.temperature) and low <= self.temperature <= high):
            raise ValueError(f"temperature must be a number from {low:g} to {high:g}, but got {self.temperature!r}")
        if not (_is_number(self.kd_ratio) and 0.0 <= self.kd_ratio <= 1.0):
            raise ValueError(f"kd_ratio must be a number in [0, 1], but got {self.kd_ratio!r}")
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise ValueError(f"ignore_index must be an integer, but got {self.ignore_index!r}")
        if not isinstance(self.scale_by_temperature_squared, bool):
            got = self.scale_by_temperature_squared
            raise ValueError(f"scale_by_temperature_squared must be True or False, but got {got!r}")
        # whole numbers would be compiled into kernels of their own
        for name in ("temperature", "kd_ratio", "beta"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))

    @property
    def divergence_scale(self) -> float:
        """Factor of D in the printed ``kd_loss``: T² or 1."""
        return self.temperature**2 if self.scale_by_temperature_squared else 1.0


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
