"""Checks of several teachers, each a ValueError of one sentence.

Legend: V vocabulary, D hidden width.
"""

from collections.abc import Sequence
from typing import Any

from ._float8 import Float8Weight
from ._objective import is_number
from ._teachers import LOGITS, TeacherHead

# Of shares that were written with few digits, or added up in fp32.
_ROUNDING = 1e-5


def is_ensemble(hidden: Any, weight: Any, bias: Any) -> bool:
    """Return whether a teacher's hidden states and heads come in sequences.

    Raises:
        ValueError: if some do and others do not, or their lengths differ.
    """
    given = {"teacher_hidden": hidden, "teacher_weight": weight}
    if bias is not None:
        given["teacher_bias"] = bias
    lengths = {name: len(value) for name, value in given.items() if _is_sequence(value)}
    if not lengths:
        return False
    if len(lengths) < len(given):
        name = next(iter(lengths))
        raise ValueError(
            f"{name} must be a tensor, but got {type(given[name]).__name__}; for an ensemble pass "
            f"{' and '.join(given)} as equally long sequences of tensors"
        )
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        counted = " and ".join(f"{length} of {name}" for name, length in lengths.items())
        raise ValueError(f"an ensemble needs one of each for every member, and a member, but got {counted}")
    return True


def members_of(hidden: Any, weight: Any, bias: Any) -> list[tuple[Any, Any, Any]]:
    """Return the hidden states, head and bias of each member."""
    return list(zip(hidden, weight, [None] * len(hidden) if bias is None else bias, strict=True))


def check_no_shares(shares: object) -> None:
    """Check that a single teacher has no shares."""
    if shares is not None:
        raise ValueError("teacher_shares weigh the members of an ensemble, but the teacher is one; leave them out")


def check_shares(shares: Sequence[float] | None, members: int) -> tuple[float, ...]:
    """Return the members' shares, the same for all if None.

    Raises:
        ValueError: if they are not one for each, above 0, and 1 together.
    """
    if shares is None:
        return (1.0 / members,) * members
    if not _is_sequence(shares) or len(shares) != members:
        raise ValueError(f"teacher_shares must be one number for each of the {members} members, but got {shares!r}")
    if not all(is_number(share) and share > 0.0 for share in shares):
        raise ValueError(f"teacher_shares must be numbers above 0, but got {list(shares)}; leave out who has no share")
    total = sum(shares)
    if not abs(total - 1.0) <= _ROUNDING:
        raise ValueError(f"teacher_shares must add up to 1, but {list(shares)} add up to {total:g}")
    return tuple(float(share) for share in shares)


def check_mixed(heads: Sequence[TeacherHead], mix: str) -> None:
    """Check that the members' logits can be mixed.

    Raises:
        ValueError: if their dtypes differ, or heads in 8-bit floats are to be summed.
    """
    dtypes = sorted({str(head.hidden.dtype) for head in heads})
    if len(dtypes) > 1:
        raise ValueError(f"members of an ensemble must have one dtype, but got {' and '.join(dtypes)}; convert some")
    if mix == LOGITS and len(heads) > 1 and any(head.scale is not None for head in heads):
        raise ValueError(
            "teacher_mix='logits' adds products up, which those of heads in 8-bit floats cannot be; use "
            "teacher_mix='probabilities' or leave the heads as they are"
        )


def _is_sequence(value: object) -> bool:
    return isinstance(value, list | tuple) and not isinstance(value, Float8Weight)
