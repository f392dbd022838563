"""What an optimizer keeps and what its step needs for a moment, read off the real one at small parameters."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchtune_kd.config.sections import Section
from torchtune_kd.errors import UserError
from torchtune_kd.plan.tracker import Tracker, tensor_bytes

_SHAPE = (256, 512)  # 8-bit optimizers keep fp32 states of parameters below 4096 elements


@dataclass(frozen=True)
class OptimizerCost:
    """Bytes per trained element.

    Attributes:
        state (float): kept from the first step on.
        temporary_of_all (float): during a step, for each element of all parameters.
        temporary_of_one (float): during a step, for each element of the parameter at hand.
    """

    state: float
    temporary_of_all: float
    temporary_of_one: float

    def state_bytes(self, elements: int) -> int:
        return round(self.state * elements)

    def temporary_bytes(self, elements: int, largest: int) -> int:
        """Return the bytes of a step over ``elements``, of which the largest parameter has ``largest``."""
        return round(self.temporary_of_all * elements + self.temporary_of_one * largest)


def optimizer_cost(section: Section, dtype: torch.dtype, device: torch.device) -> OptimizerCost | None:
    """Return the costs of an optimizer; None if it is not installed or does not grow with the elements.

    Args:
        section (Section): the config's ``optimizer``.
        dtype (torch.dtype): of the weights.
        device (torch.device): that the run is for; PyTorch's optimizers work on all parameters at once on CUDA unless
            told otherwise, and on one after the other on the CPU.
    """
    try:
        few, many = _measure(section, dtype, device, 2), _measure(section, dtype, device, 4)
    except UserError:  # not for this host, or not installed
        return None
    if few is None or many is None:
        return None
    elements = _SHAPE[0] * _SHAPE[1]
    of_all = max(0, many[1] - few[1]) / (2 * elements)
    return OptimizerCost(
        state=few[0] / (2 * elements),
        temporary_of_all=of_all,
        temporary_of_one=max(0.0, few[1] / elements - 2 * of_all),
    )


def _measure(section: Section, dtype: torch.dtype, device: torch.device, count: int) -> tuple[int, int] | None:
    """Measure bytes of the state, and what a second step allocates for a moment; return None for a factored state."""
    parameters = [nn.Parameter(torch.zeros(_SHAPE, dtype=dtype)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = section.build(parameters, **_defaults_on(device, section))
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        optimizer.step()
    state = [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, Tensor) and v.numel() > 1]
    if any(v.shape != torch.Size(_SHAPE) for v in state):
        return None
    if section.component.startswith("torchao."):
        return sum(map(tensor_bytes, state)), 0  # compiled, it holds nothing between operations
    tracker = Tracker("cpu")
    known = [*parameters, *(parameter.grad for parameter in parameters), *state]
    steps = [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, Tensor) and v.numel() == 1]
    tracker.hold("known", known + steps)
    before = sum(tracker.live.values())
    with tracker:
        optimizer.step()
    return sum(map(tensor_bytes, state)), max(tracker.peaks.values()) - before


def _defaults_on(device: torch.device, section: Section) -> dict[str, Any]:
    parameters = section.parameters()
    unset = section.get("fused") is None and section.get("foreach") is None
    return {"foreach": True} if device.type == "cuda" and "foreach" in parameters and unset else {}
