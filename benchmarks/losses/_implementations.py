"""What is compared: ours and the peers, each with what it can compute and why it may not run here.

An implementation is a function of the inputs and the case that returns the loss; leaves that require grad are among
the inputs. What it lacks is taken out of the case first (:meth:`Implementation.effective`).
"""

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from ._case import Case
from ._inputs import Inputs
from ._peers import fla, liger, torchtune

KL = ("forward_kl", "reverse_kl")
STOCK = (*KL, "symmetric_kl")
JSD = (*KL, "jsd")  # Liger's generalized one
EVERY = (*STOCK, "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")

# What an implementation may lack, and what a report says of it.
LACKS = {
    "cross_entropy": "no cross-entropy: computes the divergence alone",
    "temperature": "no temperature: computes T = 1",
    "ignored": "cannot ignore tokens: computes all",
    "frozen": "computes the head's gradient though the head is frozen",
    "loss_only": "computes the gradient with the loss although nobody asks for it",
    "whole_logits": "holds the logits [N, V] of both models",
    "probabilities": "wants the teacher's probabilities [N, V], made from its hidden states by torch",
    "log_probabilities": "wants log-probabilities [N, V], made from the logits by torch in fp32",
    "log_probabilities_bf16": "wants log-probabilities [N, V], made from the logits by torch in bf16",
    "entropy": "forward KL without the teacher's entropy: the value is a cross-entropy, the gradient the same",
}


class Implementation(NamedTuple):
    """One column of the comparison."""

    key: str  # what `--implementations` searches
    package: str
    ops: tuple[str, ...]
    divergences: tuple[str, ...]
    call: Callable[[Inputs, Case], Tensor]
    lacks: tuple[str, ...] = ()
    needs_gpu: bool = False
    cpu_reason: str = ""  # why it is left out on a CPU although it could run
    slow: bool = False  # on a GPU another entry of its package is faster, so that variations go without this one

    def fits(self, case: Case) -> bool:
        """Return whether the case asks for something this one is made for."""
        wanted = case.peers != "none" or self.key.startswith("ours")
        return wanted and case.op in self.ops and case.divergence in self.divergences

    def missing(self, device: str, case: Case | None = None) -> str | None:
        """Why it cannot run here, or is left out of a case, or None."""
        reason = package_missing(self.package)
        if reason is None and self.needs_gpu and device != "cuda" and not self._interpreted():
            reason = "needs a GPU (Triton kernels)"
        if reason is None and self.cpu_reason and device != "cuda":
            reason = self.cpu_reason
        if reason is None and self.slow and device == "cuda" and case and case.peers != "all":
            reason = "left out of this variation, see the main line at N=8192"
        return reason

    def effective(self, case: Case) -> Case:
        """The part of the case that it computes."""
        if "cross_entropy" in self.lacks:
            case = case._replace(kd_ratio=1.0)
        if "temperature" in self.lacks:
            case = case._replace(temperature=1.0)
        if "ignored" in self.lacks:
            case = case._replace(ignored=0.0)
        return case

    def notes(self, case: Case) -> list[str]:
        """Names in `LACKS` of what matters in this case."""
        asked = {
            "cross_entropy": case.kd_ratio < 1,
            "temperature": case.temperature != 1,
            "ignored": case.ignored > 0,
            "frozen": case.gradient and not case.trainable_head,
            "loss_only": not case.gradient,
            "entropy": case.divergence in ("forward_kl", "symmetric_kl"),
        }
        return [name for name in self.lacks if asked.get(name, True)]

    def entropy_share(self, case: Case) -> float:
        """Return how much of the teacher's entropy its value holds on top of the divergence."""
        if "entropy" not in self.lacks:
            return 0.0
        share = {"forward_kl": 1.0, "symmetric_kl": 0.5}.get(case.divergence, 0.0)
        return share * case.kd_ratio * case.temperature**2

    def _interpreted(self) -> bool:
        return self.package == "torchtune_kd" and os.environ.get("TRITON_INTERPRET") == "1"


def package_missing(package: str) -> str | None:
    """Why a package cannot be imported, or None. Ours is also found as the folder ``kernels``."""
    if package == "torchtune_kd":
        return None
    found = importlib.util.find_spec(package)
    return None if found else f"not installed (pip install {_DISTRIBUTIONS[package][0]})"


def kernels() -> ModuleType:
    """Our kernels: the installed ones, or the folder of this checkout."""
    try:
        return importlib.import_module("torchtune_kd.kernels")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("torchtune_kd"):
            raise
        return importlib.import_module("kernels")


def _ours(backend: str) -> Callable[[Inputs, Case], Tensor]:
    def call(inputs: Inputs, case: Case) -> Tensor:
        settings = {
            "divergence": case.divergence,
            "temperature": case.temperature,
            "kd_ratio": case.kd_ratio,
            "backend": backend,
            "return_metrics": {"": False, "all": True}.get(case.metrics, (case.metrics,)),
        }
        if case.op == "softmax":
            result = kernels().softmax_kd_loss(inputs.student, inputs.teacher, inputs.given_labels, **settings)
        else:
            heads = (inputs.student, inputs.student_head, inputs.teacher, inputs.teacher_head)
            result = kernels().linear_kd_loss(*heads, inputs.given_labels, **settings)
        return result[0] if case.metrics else result

    return call


_SLOW = "takes minutes on a CPU, where PyTorch copies the head for every chunk; --llama measures it"
_STOCK = ("entropy",)
_STOCK_LINEAR = ("entropy", "whole_logits")
_CHUNKED = ("frozen", "loss_only")
_LOG = ("log_probabilities", "cross_entropy")
_PROBABILITIES = ("probabilities", "cross_entropy")
_LOG_BF16 = ("log_probabilities_bf16", "cross_entropy")

IMPLEMENTATIONS = (
    Implementation("ours-triton", "torchtune_kd", ("softmax", "linear"), EVERY, _ours("triton"), needs_gpu=True),
    Implementation("ours-torch", "torchtune_kd", ("softmax", "linear"), EVERY, _ours("torch"), slow=True),
    *(
        Implementation(key, "torchtune", (op,), STOCK, call, lacks, cpu_reason=reason, slow=slow)
        for key, op, call, lacks, reason, slow in (
            ("torchtune", "softmax", torchtune.from_logits, _STOCK, "", True),
            ("torchtune-compile", "softmax", torchtune.from_logits_compiled, _STOCK, "", False),
            ("torchtune", "linear", torchtune.full, _STOCK_LINEAR, "", True),
            ("torchtune-compile", "linear", torchtune.full_compiled, _STOCK_LINEAR, "", False),
            ("torchtune-chunked", "linear", torchtune.chunked, _STOCK_LINEAR, _SLOW, True),
            ("torchtune-chunked-compile", "linear", torchtune.chunked_compiled, _STOCK_LINEAR, _SLOW, True),
        )
    ),
    *(
        Implementation(key, package, (op,), divergences, call, lacks, needs_gpu=True, slow=key == "liger-fused-kl")
        for key, package, op, divergences, call, lacks in (
            ("liger-kl", "liger_kernel", "softmax", KL[:1], liger.kl_div, (*_LOG, "ignored")),
            ("liger-jsd", "liger_kernel", "softmax", JSD, liger.jsd, (*_LOG, "loss_only")),
            ("liger-jsd-bf16", "liger_kernel", "softmax", JSD[2:], liger.jsd_bf16, (*_LOG_BF16, "loss_only")),
            ("liger-fused-jsd", "liger_kernel", "linear", JSD, liger.fused_jsd, ("cross_entropy", "loss_only")),
            ("liger-fused-kl", "liger_kernel", "linear", KL[:1], liger.fused_kl, (*_PROBABILITIES, "loss_only")),
            ("fla-fused-kl", "fla", "linear", KL[:1], fla.fused_kl, ("cross_entropy", "temperature", "ignored")),
        )
    ),
    *(
        Implementation(key, "liger_kernel", ("linear",), JSD, call, _CHUNKED, cpu_reason=reason, slow=slow)
        for key, call, reason, slow in (
            ("liger-chunked", liger.chunked, "", True),
            ("liger-chunked-compile", liger.chunked_compiled, "on a CPU it is measured without torch.compile", False),
        )
    ),
)

# Package -> the distributions that hold it, the one to install first.
_DISTRIBUTIONS = {
    "torchtune": ("torchtune",),
    "liger_kernel": ("liger-kernel",),
    "fla": ("flash-linear-attention", "fla-core"),
}


def versions() -> dict[str, str]:
    """Versions of everything that takes part, ``missing`` where it does not."""
    names = ["torch", "triton", "torchtune-kd", *(name for names in _DISTRIBUTIONS.values() for name in names)]
    return {name: _version(name) for name in names}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of this checkout" if distribution == "torchtune-kd" else "missing"
