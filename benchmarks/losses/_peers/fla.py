"""flash-linear-attention: forward KL from hidden states, in chunks, without temperature, labels or cross-entropy."""

from torch import Tensor

from .._case import Case
from .._inputs import Inputs


def fused_kl(inputs: Inputs, case: Case) -> Tensor:
    from fla.modules.fused_kl_div import fused_kl_div_loss

    return fused_kl_div_loss(inputs.student, inputs.teacher, inputs.student_head, inputs.teacher_head)
