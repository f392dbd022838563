"""A teacher's stored ids, and the loss of their cells from the formulas, on all logits: independent of the code.

Legend: N tokens, n valid tokens, V vocabulary, D hidden width, k stored ids a token, m = k + 1 cells.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from helpers import oracle
from torchtune_kd.kernels import Objective, linear_sparse_kd_loss

F64 = torch.float64


class Case(NamedTuple):
    """Hold the student's factors, the teacher's logits and what is stored of them."""

    hidden: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor  # [V]
    teacher: torch.Tensor  # [n, V] logits of the valid tokens
    labels: torch.Tensor  # [N]
    ids: torch.Tensor  # [n, k]

    @property
    def student(self):
        """Return the logits of the valid tokens ``[n, V]``."""
        return F.linear(self.hidden, self.weight, self.bias)[self.labels != -100]

    @property
    def trained(self):
        return self.hidden, self.weight, self.bias

    def signal(self, t, dtype=F64):
        """Return the stored log-probabilities, and the tails at T and at 1, each the sum over the ids not stored."""
        log_probs = self.teacher.log_softmax(-1)
        stored = log_probs.gather(-1, self.ids.clamp(min=0))
        rest = log_probs.masked_fill(is_stored(self.ids, log_probs.shape[-1]), -torch.inf)
        tail, tail_at_1 = (torch.logsumexp(rest / at, -1).to(dtype) for at in (t, 1.0))
        return {"ids": self.ids, "log_probs": stored.to(dtype), "tail": tail, "tail_at_1": tail_at_1}

    def loss(self, t, stored=F64, **settings):
        """Compute the loss of what is stored in the dtype `stored`, of which fp64 decides on that of the arithmetic."""
        signal = self.signal(t, stored) | {
            name: settings.pop(name) for name in ("tail", "tail_at_1") if name in settings
        }
        student = {"student_hidden": self.hidden, "student_weight": self.weight, "student_bias": self.bias}
        return linear_sparse_kd_loss(**student, **signal, labels=self.labels, temperature=t, **settings)

    def gradients(self, loss):
        return torch.autograd.grad(loss, [x for x in self.trained if x.requires_grad])

    def to(self, dtype):
        """Return the same student in another dtype, trained where it is here."""
        trained = (x.detach().to(dtype).requires_grad_(x.requires_grad) for x in self.trained)
        return Case(*trained, *self[3:])


def make(k, n=11, v=97, d=6, padded=False, dtype=F64, scale=2.0):
    """Make a case whose every third token is ignored and, if `padded`, whose tokens store between 1 and k ids."""
    hidden, weight, bias = torch.randn(n, d), torch.randn(v, d) / 2, torch.randn(v)
    labels = torch.randint(v, (n,))
    labels[1::3] = -100
    teacher = torch.randn(int((labels != -100).sum()), v, dtype=F64) * scale
    ids = teacher.topk(k).indices
    if padded:
        stored = torch.randint(1, k + 1, (len(ids), 1))
        ids = ids.where(torch.arange(k) < stored, -1)[:, torch.randperm(k)]
    return Case(*(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), teacher, labels, ids)


def of_logits(k, v, n=5, dtype=F64, padded=False):
    """Make a case whose head is the identity, so that hidden states are logits and have the gradient of the logits."""
    case = make(k, n, v, 1, padded)
    logits, head = (2 * torch.randn(n, v)).to(dtype), torch.eye(v, dtype=dtype)
    return case._replace(hidden=logits.requires_grad_(), weight=head, bias=torch.zeros(v, dtype=dtype))


def small_rests():
    """Make logits ``[25, V]`` as bf16 models give them, and one stored id of each, beside which ever less is left.

    Returns:
        tuple[Tensor, Tensor, dict[float, Tensor]]: logits, ids ``[25, 1]``, and by T the rest's mass in fp64 ``[25]``.
    """
    logits, ids = torch.randn(25, 4000), torch.full((25, 1), 7)
    logits[:, 7] += torch.tensor([10.0, 18.0, 25.0, 36.0, 60.0]).repeat_interleave(5)  # the fourth leaves 1e-11
    logits = logits.bfloat16()
    return logits, ids, {t: log_cells(logits.double(), ids, t)[:, -1].exp() for t in (2.0, 1.0)}


def is_stored(ids, v):
    """Mark the ids that are stored ``[n, V]``; padding marks none."""
    return (ids.unsqueeze(-1) == torch.arange(v)).any(1)


def log_cells(logits, ids, t):
    """Compute the logarithms of a distribution's m cells, ``[n, m]``; -inf where there is padding, or no rest."""
    log_q = torch.log_softmax(logits / t, -1)
    stored = log_q.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    inside = is_stored(ids, logits.shape[-1])
    rest = log_q.masked_fill(inside, -torch.inf).logsumexp(-1).where(~inside.all(-1), -torch.inf)
    return torch.cat([stored, rest.unsqueeze(-1)], -1)


def divergence(name, beta, log_p, log_q):
    """Compute D of each row's cells, by the formulas on those that are there, ``[n]``."""
    values = []
    for p, q in zip(log_p, log_q, strict=True):
        there = ~(torch.isinf(p) & torch.isinf(q))
        values.append(oracle.divergence_of(name, beta, p[there], q[there]))
    return torch.stack(values)


def truth(case, name, t, kd_ratio=1.0, beta=None):
    """Compute the mean loss of the valid tokens, differentiable."""
    beta = Objective(name, beta).beta
    d = divergence(name, beta, log_cells(case.teacher, case.ids, t), log_cells(case.student, case.ids, t))
    ce = F.cross_entropy(case.student, case.labels[case.labels != -100], reduction="none")
    return (kd_ratio * t * t * d + (1 - kd_ratio) * ce).mean()


def entropy(logits):
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def sums_of_metrics(case, kd_loss):
    """Compute sums over the valid tokens, by name; `kd_loss` is the mean of theirs."""
    labels = case.labels[case.labels != -100]
    log_p, log_q = (log_cells(z, case.ids, 1.0) for z in (case.teacher, case.student.detach()))
    hit = case.ids == labels.unsqueeze(-1)
    cell = torch.where(hit.any(-1), hit.long().argmax(-1), case.ids.shape[-1])
    return {
        "class_loss": F.cross_entropy(case.student, labels, reduction="sum"),
        "teacher_class_loss_cells": -log_p.gather(-1, cell.unsqueeze(-1)).sum(),
        "kd_loss": kd_loss * len(labels),
        "kl_cells": divergence("forward_kl", None, log_p, log_q).sum(),
        "top1_agreement": (case.student.argmax(-1) == case.teacher.argmax(-1)).sum(),
        "student_entropy": entropy(case.student).sum(),
        "teacher_entropy": entropy(case.teacher).sum(),
        "acceptance_rate_cells": torch.minimum(log_p.exp(), log_q.exp()).sum(),
        "num_tokens": torch.tensor(len(labels)),
    }
