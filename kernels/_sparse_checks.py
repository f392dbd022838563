"""Checks of a teacher's stored ids, each a ValueError of one sentence.

Legend: n valid tokens, V vocabulary, k stored ids a token.
"""

import torch

from ._checks import MAX_PADDING, check_floating, check_tensor
from ._objective import ENTROPY, TAIL_AT_1, TEACHER, TOP_IDS, Objective
from ._plan import Tokens, host_can_read, is_capturing
from ._teachers import Cells

_UNBOUNDED = ("reverse_kl", "symmetric_kl")


def check_sparse_objective(objective: Objective, has_tail: bool, sampled: bool) -> None:
    """Check that the divergence is defined by what is stored.

    Raises:
        ValueError: if it is not.
    """
    name, computed = objective.divergence, objective.computed_divergence
    if sampled and (computed != "forward_kl" or objective.temperature != 1.0):
        raise ValueError(
            f"sampled ids are unbiased for forward_kl at temperature 1 alone, but got {name} at "
            f"{objective.temperature}; use that, or store the likeliest ids with their tail"
        )
    if sampled and has_tail:
        raise ValueError("sampled ids have no tail, the ids that were not drawn count nothing; leave tail out")
    if not (sampled or has_tail) and computed in _UNBOUNDED:
        raise ValueError(
            f"{name} is infinite where the teacher has no mass outside of the stored ids, as tail=None says; pass the "
            f"tail at temperature {objective.temperature}, or use forward_kl, jsd, a skewed KL or tvd"
        )


def sparse_inputs(has_ids: bool, has_tail_at_1: bool, has_entropy: bool, sampled: bool) -> set[str]:
    """Return the names of what metrics may be computed of."""
    given = {TEACHER: has_ids, TOP_IDS: not sampled, TAIL_AT_1: has_tail_at_1 and not sampled, ENTROPY: has_entropy}
    return {name for name, there in given.items() if there}


def check_cells(cells: Cells, device: torch.device) -> None:
    """Check shapes, dtypes and devices.

    Raises:
        ValueError: if they do not fit together.
    """
    ids = cells.ids
    check_tensor("ids", ids)
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"ids must be [n, k] for the n valid tokens in order, k at least 1, but got {list(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be integers, but got {ids.dtype}")
    for name, tensor in cells._asdict().items():
        if tensor is None:
            continue
        if name != "ids":
            check_floating(name, tensor)
            shape = ids.shape if name == "log_probs" else ids.shape[:1]
            if tensor.shape != shape:
                raise ValueError(f"{name} must be {list(shape)} to fit ids, but got {list(tensor.shape)}")
            if tensor.requires_grad:
                raise ValueError(f"{name} must not require grad, the teacher is not trained; pass {name}.detach()")
        if tensor.device != device:
            raise ValueError(f"{name} must be on the student's device {device}, but is on {tensor.device}")


def check_not_captured(device: torch.device) -> None:
    """Check that no CUDA graph is being captured: it would have the rows of stored ids of one batch for ever.

    Raises:
        ValueError: if one is.
    """
    if is_capturing(device):
        raise ValueError(
            "linear_sparse_kd_loss cannot be captured in a CUDA graph, in which the number of valid tokens, and with "
            "it of the rows of ids, would be fixed; leave it out of the graph"
        )


def check_cells_of(cells: Cells, tokens: Tokens, vocab: int) -> None:
    """Check that there is one row of stored ids for every valid token, and on the CPU that the ids are some.

    Elsewhere reading them would wait for the device.

    Raises:
        ValueError: if there is not, or they are not.
    """
    rows, valid = cells.ids.shape[0], len(tokens.labels)
    if rows != valid and not cells.ids.is_meta:
        raise ValueError(f"ids must have one row for each of the {valid} valid tokens, but got {rows}")
    if not host_can_read(cells.ids.device):
        return
    ids = cells.ids.long()
    wrong = (ids < -1) | (ids >= vocab + MAX_PADDING)
    if wrong.any():
        raise ValueError(
            f"ids must lie in [0, {vocab}) or be -1 for padding, but one is {ids[wrong][0].item()}; distil between "
            f"models that share a tokenizer"
        )
    in_order = ids.sort(-1).values
    twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
    if twice.any():
        raise ValueError(
            f"ids of one token must differ, but {in_order[:, 1:][twice][0].item()} is stored twice; merge them"
        )
    stored = ((ids >= 0) & (ids < vocab)).any(-1)
    if cells.tail is None and not stored.all():
        raise ValueError(
            "every token must have an id that is stored where tail is None, but one has none; pass the tail"
        )
