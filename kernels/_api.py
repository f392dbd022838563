"""The public functions: settings become an `Objective`, and the tensors' loss is that of one.

Legend: N tokens, n valid tokens, V vocabulary, D hidden width, B batch, S sequence, k stored ids a token.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from ._call import Result, linear_kd_objective, softmax_kd_objective
from ._float8 import Float8Weight
from ._objective import Objective
from ._sparse import linear_sparse_kd_objective


def softmax_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    kd_ratio: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale_by_temperature_squared: bool = True,
    scale: float = 1.0,
    backend: str = "auto",
    return_metrics: bool | Sequence[str] = False,
    group: "dist.ProcessGroup | None" = None,
) -> Result:
    r"""Compute the distillation loss of given logits.

    For the valid tokens (label other than `ignore_index`) with student logits :math:`z_s`, teacher logits
    :math:`z_t`, :math:`q_T = \mathrm{softmax}(z_s/T)`, :math:`p_T = \mathrm{softmax}(z_t/T)` and α =
    `kd_ratio`:

    .. math:: (1-\alpha)\,\mathrm{CE}(y, q_1) + \alpha\,T^2\,D(p_T, q_T)

    ===================  ============================================  ====  ===============
    divergence           D(p, q)                                       beta  source
    ===================  ============================================  ====  ===============
    ``forward_kl``       Σ p log(p/q)                                  none  Hinton, 2015
    ``reverse_kl``       Σ q log(q/p)                                  none  MiniLLM, 2024
    ``symmetric_kl``     β·KL(p‖q) + (1-β)·KL(q‖p)                     0.5   torchtune
    ``jsd``              β·KL(p‖m) + (1-β)·KL(q‖m), m = βp + (1-β)q;   0.5   GKD, 2024
                         β = 0 means ``forward_kl``, 1 ``reverse_kl``
    ``skew_forward_kl``  KL(p ‖ βp + (1-β)q)                           0.1   DistiLLM, 2024
    ``skew_reverse_kl``  KL(q ‖ (1-β)p + βq)                           0.1   DistiLLM, 2024
    ``tvd``              ½ Σ \|p - q\|                                 none  f-distill, 2023
    ===================  ============================================  ====  ===============

    All are true divergences: never negative, 0 when the student equals the teacher. Arithmetic is fp32, or
    fp64 where an input is fp64. The gradient, to the student alone, is computed together with the loss; to
    differentiate it again is an error, and so are forward mode and the transforms of ``torch.func``. Without a
    valid token the loss is 0 and so is the gradient. An id at -inf in both models contributes nothing; where D
    is +inf the value is +inf and the gradient stays finite.
    Gradients of logits are rounded to the student's dtype before the incoming gradient multiplies them: in
    fp16 those below 6e-8 are 0, whatever the loss is scaled by; train in bf16 or fp32.
    Vocabularies that differ by less than 1024 ids are cut to the shared prefix. Inside ``torch.compile`` the
    call is one operator of the graph.

    Args:
        student_logits (Tensor): ``[N, V]`` or ``[B, S, V]``, bf16, fp16, fp32 or fp64, any strides.
        teacher_logits (Tensor | None): the same leading shape, any of these dtypes, not requiring grad. Not
            touched, and may be None, if `kd_ratio` is 0 and no metric asks for it.
        labels (Tensor | None): ``[N]`` or ``[B, S]``, integers in [0, V) or `ignore_index`. None makes every
            token valid and needs `kd_ratio` 1. Values are checked on the CPU only (elsewhere that would wait
            for the device).
        divergence (str): D, one of :data:`DIVERGENCES`.
        beta (float | None): in [0, 1]; None takes the default of the table.
        temperature (float): T in [0.001, 1000].
        kd_ratio (float): α in [0, 1]. At 1 no cross-entropy is computed.
        ignore_index (int): label of tokens that do not count.
        reduction (str): "mean" over valid tokens, "sum", or "none" (the labels' shape, 0 at ignored tokens).
        scale_by_temperature_squared (bool): multiply D by T², which keeps gradients comparable across T.
        scale (float): multiplies loss and gradient, not the metrics. A division by accumulation steps costs nothing
            here; as ``loss / steps`` it takes ``backward()`` a pass over the stored gradient ``[N, V]``.
        backend (str): "torch", "triton" (on CUDA tensors, or where TRITON_INTERPRET=1 interprets it) or "auto":
            Triton for CUDA tensors where it is installed and none is fp64, torch otherwise.
        return_metrics (bool | Sequence[str]): True for all of :data:`METRICS` that the inputs define, or the
            names of some.
        group (dist.ProcessGroup | None): vocabulary-parallel: each process of the group holds a shard of the ids of
            both models, in the order of ranks and cut at the same ids (shards may differ in size, and in the last
            one either model may have padding). `labels` are ids of the whole vocabulary and the same on all
            processes; so are the loss and the metrics, while each gets the gradient of its own shard. Triton only.

    Returns:
        Tensor | tuple[Tensor, dict[str, Tensor]]: the loss in fp32 (fp64), and with `return_metrics` a dict
        of detached fp32 0-d tensors: sums over the valid tokens, so that microbatches and ranks add up, and
        ``num_tokens`` to divide by.

    Raises:
        ValueError: on unknown or unusable arguments.
    """
    return softmax_kd_objective(
        student_logits,
        teacher_logits,
        labels,
        Objective(divergence, beta, temperature, kd_ratio, ignore_index, scale_by_temperature_squared),
        reduction=reduction,
        scale=scale,
        backend=backend,
        return_metrics=return_metrics,
        group=group,
    )


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor] | None,
    teacher_weight: Tensor | Float8Weight | Sequence[Tensor | Float8Weight] | None,
    labels: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
    teacher_shares: Sequence[float] | None = None,
    teacher_mix: str = "probabilities",
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    kd_ratio: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale_by_temperature_squared: bool = True,
    chunk_tokens: int | None = None,
    teacher_head_dtype: str | None = None,
    backend: str = "auto",
    return_metrics: bool | Sequence[str] = False,
) -> Result:
    r"""Compute the distillation loss of ``hidden @ weight.T`` without ever holding ``[N, V]``.

    Ignored tokens are dropped before the matrix products. The rest is worked through in chunks: at most one
    chunk of logits of each model exists at a time, and the student's is overwritten by its gradient.
    Gradients are computed for those of `student_hidden`, `student_weight` and `student_bias` that require
    one (none for a frozen head, none at all under ``no_grad``); a head's is accumulated over chunks in fp32,
    from products that are rounded to the head's dtype.
    Logits are rounded to the models' dtype, as a linear layer's are; the loss arithmetic and its limits are
    those of :func:`softmax_kd_loss`. Under autocast the products run in autocast's dtype, except fp64 ones.

    Several teachers are an ensemble: `teacher_hidden` and `teacher_weight` (and `teacher_bias`) are equally long
    sequences. Members m may have widths and paddings of the vocabulary of their own; with shares w the teacher is

    .. math:: p_T = \mathrm{softmax}\Big(\tfrac1T \log \sum_m w_m\,\mathrm{softmax}(z_m)\Big), \qquad
        p_T = \mathrm{softmax}\Big(\tfrac1T \sum_m w_m z_m\Big)

    The first, "probabilities", is the model whose probabilities are the members' mean; T softens it as it softens any
    model, and not each of its members. The second, "logits", is their normalised geometric mean. One member is a
    teacher like any other.

    Args:
        student_hidden (Tensor): last hidden states ``[N, D]`` or ``[B, S, D]``, bf16, fp16, fp32 or fp64.
        student_weight (Tensor): output projection ``[V, D]``, of the same dtype.
        teacher_hidden (Tensor | Sequence[Tensor] | None): the same leading shape, a width of its own. Not touched, and
            may be None, if `kd_ratio` is 0 and no metric asks for it; so may `teacher_weight`.
        teacher_weight (Tensor | Float8Weight | Sequence[Tensor | Float8Weight] | None): ``[V, D]`` of the teacher, or
            what :func:`float8_weight` made of it.
        labels (Tensor): ``[N]`` or ``[B, S]``, integers in [0, V) or `ignore_index`. May stay on the CPU
            while the rest is on a device: then ignored tokens are dropped without waiting for it. With labels on
            the device the host waits once, for the number of valid tokens. A CUDA graph captures labels on the
            device only, and with them the products of all tokens.
        student_bias (Tensor | None): ``[V]`` floating; used, like the next, in the dtype of the products.
        teacher_bias (Tensor | Sequence[Tensor | None] | None): ``[V]`` of the teacher.
        teacher_shares (Sequence[float] | None): w of each member of an ensemble, above 0; they add up to 1. None gives
            all the same.
        teacher_mix (str): what of an ensemble's members is averaged, "probabilities" or "logits".
        divergence (str): see :func:`softmax_kd_loss`, as for all arguments down to
            `scale_by_temperature_squared`.
        beta (float | None): parameter of the divergence.
        temperature (float): T in [0.001, 1000].
        kd_ratio (float): α in [0, 1].
        ignore_index (int): label of tokens that do not count.
        reduction (str): "mean", "sum" or "none". "none" with a trainable head computes its products twice.
        scale_by_temperature_squared (bool): multiply D by T².
        chunk_tokens (int | None): tokens per chunk; None chooses them so that both chunks of logits (of a mean of
            probabilities a third one, in fp32) take at most 256 MiB on a CPU and 1 GiB elsewhere (and at least 128
            tokens). PyTorch's loss arithmetic needs another 14 MiB on a CPU and 224 MiB elsewhere, Triton's nothing.
        teacher_head_dtype (str | None): "float8" computes the teacher's logits from hidden states and head in
            float8_e4m3fn, each row with a scale of its own, summed in fp32; the teacher's D must be a multiple of 16.
            It quantises `teacher_weight` in every call, unless that is a ``Float8Weight``, which needs no
            `teacher_head_dtype`. On NVIDIA's GPUs of compute capability 8.9 and later the product of a bf16 teacher
            takes about 0.6 times as long; anywhere else it is emulated, and slower. README.md has the error.
        backend (str): see :func:`softmax_kd_loss`; of the loss arithmetic, the products are PyTorch's.
        return_metrics (bool | Sequence[str]): see :func:`softmax_kd_loss`.

    Returns:
        Tensor | tuple[Tensor, dict[str, Tensor]]: as :func:`softmax_kd_loss`.

    Raises:
        ValueError: on unknown or unusable arguments.
    """
    return linear_kd_objective(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        Objective(divergence, beta, temperature, kd_ratio, ignore_index, scale_by_temperature_squared),
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        teacher_shares=teacher_shares,
        teacher_mix=teacher_mix,
        reduction=reduction,
        chunk_tokens=chunk_tokens,
        teacher_head_dtype=teacher_head_dtype,
        backend=backend,
        return_metrics=return_metrics,
    )


def linear_sparse_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    ids: Tensor | None,
    log_probs: Tensor | None,
    tail: Tensor | None,
    labels: Tensor,
    *,
    student_bias: Tensor | None = None,
    tail_at_1: Tensor | None = None,
    entropy: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    kd_ratio: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale_by_temperature_squared: bool = True,
    sampled: bool = False,
    chunk_tokens: int | None = None,
    backend: str = "auto",
    return_metrics: bool | Sequence[str] = False,
) -> Result:
    r"""Compute the distillation loss against a teacher of which k log-probabilities a token are stored.

    The k stored ids K of a token are cells of their own, all other ids are one cell, the rest R:

    .. math:: Q_c = q_{T,c},\quad Q_R = \sum_{j \notin K} q_{T,j},\qquad
        P_c \propto e^{\ell_c/T},\quad P_R \propto e^{t},\quad t = \log \sum_{j \notin K} e^{\ell_j/T}

    and the loss of a token is that of :func:`softmax_kd_loss` with D(P, Q) of the k + 1 cells: at most D of the whole
    distributions (data processing inequality), and equal to it where K is the whole vocabulary. The cross-entropy is
    exact. The student's logits exist one chunk of tokens at a time, as in :func:`linear_kd_loss`, and no other tensor
    has a column for every id; its limits, its dtypes and its operator of ``torch.compile`` are the same.

    With ``tail=None`` the stored ids are taken for the whole teacher: P is renormalised over them, and the student is
    drawn to 0 elsewhere. ``forward_kl``, ``jsd``, ``skew_*`` and ``tvd`` are defined then; the other two are infinite.

    With ``sampled=True`` the ids were drawn from the teacher and P = count / number of draws (Anshumann et al., 2025):
    the gradient q - P is that of the whole forward KL on average, and so is the value with `entropy`,
    Σ P·(-log q) - entropy, which may be negative. Without `entropy` it is the cross-entropy. Any other divergence or
    temperature would be biased and is an error.

    Args:
        student_hidden (Tensor): last hidden states ``[N, D]`` or ``[B, S, D]``, bf16, fp16, fp32 or fp64.
        student_weight (Tensor): output projection ``[V, D]``, of the same dtype.
        ids (Tensor | None): ``[n, k]`` integers, one row for each of the n valid tokens in the order of `labels`; all
            ids of a row differ, -1 pads. Ids from V on are dropped, as those of a padded vocabulary; from V + 1024 on
            they are an error. Values are checked on the CPU only. Not touched, and may be None, if `kd_ratio` is 0 and
            no metric asks for them; so may `log_probs`.
        log_probs (Tensor | None): ``[n, k]`` floating, the teacher's log-probabilities ℓ at T = 1, not requiring grad;
            of sampled ids log(count / number of draws). What stands at padding is not read.
        tail (Tensor | None): ``[n]`` floating, t of each token at the run's T, -inf for none; at T = 1 it is the log of
            the mass that is not stored. It does not follow from the stored ones at another T.
        labels (Tensor): ``[N]`` or ``[B, S]``, integers in [0, V) or `ignore_index`; see :func:`linear_kd_loss`.
        student_bias (Tensor | None): ``[V]`` floating.
        tail_at_1 (Tensor | None): ``[n]``, t at T = 1, for metrics where the run's T is another; not read at T = 1.
        entropy (Tensor | None): ``[n]``, the whole teacher's at T = 1, in nats.
        divergence (str): see :func:`softmax_kd_loss`, as for all arguments down to `scale_by_temperature_squared`.
        beta (float | None): parameter of the divergence.
        temperature (float): T in [0.001, 1000].
        kd_ratio (float): α in [0, 1].
        ignore_index (int): label of tokens that do not count.
        reduction (str): "mean", "sum" or "none"; see :func:`linear_kd_loss`.
        scale_by_temperature_squared (bool): multiply D by T².
        sampled (bool): the ids were drawn from the teacher.
        chunk_tokens (int | None): tokens per chunk; None chooses them by the bytes of the student's logits alone.
        backend (str): see :func:`softmax_kd_loss`; `student_hidden` and `log_probs` decide. With either one it is an
            error while a CUDA graph is captured, which cannot wait for the number of valid tokens.
        return_metrics (bool | Sequence[str]): True for all of :data:`SPARSE_METRICS` that the inputs define, or the
            names of some. ``kl_cells`` is a lower bound of the KL, ``teacher_class_loss_cells`` of the teacher's
            cross-entropy, ``acceptance_rate_cells`` an upper bound of the acceptance rate; they need the tail at
            T = 1. ``top1_agreement`` compares with the likeliest stored id, and is undefined for sampled ones.

    Returns:
        Tensor | tuple[Tensor, dict[str, Tensor]]: as :func:`softmax_kd_loss`.

    Raises:
        ValueError: on unknown or unusable arguments.
    """
    return linear_sparse_kd_objective(
        student_hidden,
        student_weight,
        ids,
        log_probs,
        tail,
        labels,
        Objective(divergence, beta, temperature, kd_ratio, ignore_index, scale_by_temperature_squared),
        student_bias=student_bias,
        tail_at_1=tail_at_1,
        entropy=entropy,
        reduction=reduction,
        sampled=sampled,
        chunk_tokens=chunk_tokens,
        backend=backend,
        return_metrics=return_metrics,
    )
