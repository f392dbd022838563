"""AdamW for weights in bf16."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

_IN_FP32 = ("master", "exp_avg", "exp_avg_sq")


class MasterAdamW(Optimizer):
    """AdamW that trains fp32 copies of the weights and rounds them to the model's dtype after every step.

    bf16 holds 8 significant bits: an update below 1/512 of a weight rounds to nothing, and so does what a step adds
    to the running mean of squares at beta2 = 0.999. Here both are kept in fp32 (Micikevicius et al. 2018,
    https://arxiv.org/abs/1710.03740; Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101), while forward and
    backward run in bf16. It keeps 12 bytes a trained weight; ``torch.optim.AdamW`` on bf16 weights keeps 4. Weights
    that are in fp32 anyway are their own copies.

    The copies are made at the first step. Weights that are changed from outside later need a new optimizer.

    Args:
        params (Iterable): Parameters, or dicts of parameter groups.
        lr (float): Learning rate. Default 1e-3.
        betas (tuple[float, float]): Decay of the means of gradients and of their squares. Default (0.9, 0.999).
        eps (float): Added to the denominator. Default 1e-8.
        weight_decay (float): Decoupled weight decay. Default 1e-2.
        fused (bool): Update each weight in one pass over memory, as in ``torch.optim.AdamW``. Default True.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        fused: bool = True,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"Expected {name} of at least 0, but got {value}; raise it.")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Expected two betas of at least 0 and below 1, but got {list(betas)}; change them.")
        betas = tuple(betas)  # a list where it comes from YAML
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in parameters]
            masters = [state["master"] for state in states]
            adamw(
                masters,
                [p.grad.float() for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=group["fused"],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, in fp32; the base class would round it to the weights' dtype."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in zip(saved, parameters, strict=True):
            for name in _IN_FP32:
                if name in state_dict["state"].get(index, {}):
                    value = state_dict["state"][index][name]
                    self.state[parameter][name] = value.to(parameter.device, torch.float32, copy=True)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            master = parameter.detach()
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["master"] = master if master.dtype == torch.float32 else master.float()
            state["exp_avg"] = torch.zeros_like(state["master"])
            state["exp_avg_sq"] = torch.zeros_like(state["master"])
        return state
