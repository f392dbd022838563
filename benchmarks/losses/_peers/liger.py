"""Liger Kernel: Triton kernels of logits and of hidden states, and a chunked distillation in PyTorch.

Its generalized JSD is forward KL at beta 0 and reverse KL at beta 1. None of them multiplies by T², so the caller
does. Its chunked cosine similarity is another objective, with nothing to compare. Legend: N tokens, V vocabulary.
"""

import torch
from torch import Tensor

from .._case import Case
from .._inputs import IGNORE, Inputs

_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def kl_div(inputs: Inputs, case: Case) -> Tensor:
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    log_q, log_p = _log_probabilities(inputs, case, torch.float32)
    return _scaled(LigerKLDIVLoss(reduction="batchmean", log_target=True)(log_q, log_p), case)


def jsd(inputs: Inputs, case: Case) -> Tensor:
    return _jsd(inputs, case, torch.float32)


def jsd_bf16(inputs: Inputs, case: Case) -> Tensor:
    """Log-probabilities in the logits' dtype: half the memory, and an error to match."""
    return _jsd(inputs, case, torch.bfloat16)


def chunked(inputs: Inputs, case: Case) -> Tensor:
    return _chunked(inputs, case, compiled=False)


def chunked_compiled(inputs: Inputs, case: Case) -> Tensor:
    """Its default."""
    return _chunked(inputs, case, compiled=True)


def fused_jsd(inputs: Inputs, case: Case) -> Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(_BETA[case.divergence], IGNORE, case.temperature)
    value = loss(inputs.student, inputs.student_head, inputs.teacher, inputs.teacher_head, inputs.labels)
    return _scaled(value, case)


def fused_kl(inputs: Inputs, case: Case) -> Tensor:
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    with torch.no_grad():
        target = torch.softmax(inputs.teacher @ inputs.teacher_head.t() / case.temperature, dim=-1)  # [N, V]
    loss = LigerFusedLinearKLDivLoss("batchmean", IGNORE, case.temperature)
    value = loss(inputs.student, inputs.student_head, target, inputs.labels)
    return _scaled(value, case)


def _scaled(value: Tensor, case: Case) -> Tensor:
    """Times T²; without a product where T = 1, because their backward is cheaper then."""
    return value if case.temperature == 1 else case.temperature**2 * value


def _log_probabilities(inputs: Inputs, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return those of student and teacher ``[N, V]``."""

    def log_softmax(logits: Tensor) -> Tensor:
        if case.temperature != 1:
            logits = logits / case.temperature
        return torch.log_softmax(logits, dim=-1, dtype=dtype)

    with torch.no_grad():
        log_p = log_softmax(inputs.teacher)
    return log_softmax(inputs.student), log_p


def _jsd(inputs: Inputs, case: Case, dtype: torch.dtype) -> Tensor:
    from liger_kernel.transformers.jsd import LigerJSD

    value = LigerJSD(_BETA[case.divergence], IGNORE)(*_log_probabilities(inputs, case, dtype), inputs.labels)
    return _scaled(value, case)


def _chunked(inputs: Inputs, case: Case, compiled: bool) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - case.kd_ratio,
        weight_soft_loss=case.kd_ratio * case.temperature**2,
        beta=_BETA[case.divergence],
        ignore_index=IGNORE,
        temperature=case.temperature,
        compiled=compiled,
    )
    return loss(inputs.student, inputs.student_head, inputs.teacher, inputs.teacher_head, inputs.labels)
