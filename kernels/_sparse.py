"""The loss of a student's hidden states and a teacher's stored ids, by an `Objective` that was built before.

Legend: N tokens, n valid tokens, V vocabulary, D hidden width, B batch, S sequence, k stored ids a token.
"""

from collections.abc import Sequence

from torch import Tensor

from ._call import REDUCTIONS, Result, linear_result, wants_gradient
from ._checks import (
    BACKENDS,
    check_choice,
    check_chunk_tokens,
    check_head,
    check_labels,
    check_rows,
    check_teacher_present,
    resolve_backend,
)
from ._derivatives import check_transforms
from ._objective import Objective, needs_teacher, resolve_sparse_metrics
from ._plan import Plan
from ._sparse_checks import check_cells, check_sparse_objective, sparse_inputs
from ._teachers import CELLS, HEAD, SAMPLED, Cells, Teacher, scores_of


def linear_sparse_kd_objective(
    student_hidden: Tensor,
    student_weight: Tensor,
    ids: Tensor | None,
    log_probs: Tensor | None,
    tail: Tensor | None,
    labels: Tensor,
    objective: Objective,
    *,
    student_bias: Tensor | None = None,
    tail_at_1: Tensor | None = None,
    entropy: Tensor | None = None,
    reduction: str = "mean",
    sampled: bool = False,
    chunk_tokens: int | None = None,
    backend: str = "auto",
    return_metrics: bool | Sequence[str] = False,
) -> Result:
    """Compute :func:`linear_sparse_kd_loss` of an objective that was built, and so checked, before."""
    check_transforms()
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("backend", backend, BACKENDS)
    check_chunk_tokens(chunk_tokens)
    if labels is None:
        raise ValueError("linear_sparse_kd_loss needs labels [N] to know the valid tokens, but got None")
    check_rows("student_hidden", student_hidden, "D", labels)
    check_teacher_present("ids", ids, objective)
    check_teacher_present("log_probs", log_probs, objective)
    given = ids is not None and log_probs is not None
    has_tail_at_1 = tail is not None if objective.temperature == 1.0 else tail_at_1 is not None
    here = sparse_inputs(given, has_tail_at_1, entropy is not None, sampled)
    metrics = resolve_sparse_metrics(return_metrics, here)
    has_teacher = needs_teacher(objective.kd_ratio, metrics)
    student = check_head("student", student_hidden, student_weight, student_bias)
    vocab = student_weight.shape[0]
    teacher: Teacher = None
    kind = HEAD
    if has_teacher:
        assert ids is not None and log_probs is not None  # or it would have been refused above
        check_sparse_objective(objective, tail is not None, sampled)
        teacher, kind = Cells(ids, log_probs, tail, tail_at_1, entropy), SAMPLED if sampled else CELLS
        check_cells(teacher, student_hidden.device)
    flat_labels = check_labels(labels, vocab, objective.ignore_index)
    plan = Plan(objective, metrics, vocab, reduction, has_teacher, wants_gradient(*student), teacher_kind=kind)
    backend = resolve_backend(backend, student[0], *scores_of(teacher))
    return linear_result(student, flat_labels, plan, chunk_tokens, backend, teacher, return_metrics)
