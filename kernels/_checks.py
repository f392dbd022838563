"""Checks of the public functions' arguments, each a ValueError of one sentence.

Legend: N tokens, V vocabulary, D hidden width, B batch, S sequence.
"""

import importlib.util
import logging
import os
from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from ._float8 import FLOAT8, WIDTH_MULTIPLE, Float8Weight, padded
from ._meta import META, stands_for
from ._objective import Objective
from ._plan import autocast_type, host_can_read

BACKENDS = ("auto", "torch", "triton")
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None

# Embedding tables of one tokenizer are padded to different multiples (Qwen2.5: 151936 and 152064).
MAX_PADDING = 1024

_log = logging.getLogger(__name__)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Check that `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, but got {value!r}")


def check_scale(scale: float) -> None:
    """Check that `scale` is a finite number."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < float("inf"):
        raise ValueError(f"scale must be a finite number, but got {scale!r}")


def check_chunk_tokens(chunk_tokens: int | None) -> None:
    """Check that a chunk holds a whole number of tokens, or that their number is left open."""
    whole = isinstance(chunk_tokens, int) and not isinstance(chunk_tokens, bool)
    if chunk_tokens is not None and not (whole and chunk_tokens > 0):
        raise ValueError(f"chunk_tokens must be a whole number above 0 or None, but got {chunk_tokens!r}")


def resolve_backend(backend: str, *tensors: Tensor | None) -> str:
    """Return one of `BACKENDS` but "auto", or inside of ``on_meta`` its backend.

    Args:
        backend (str): what was asked for.
        *tensors (Tensor | None): what the loss arithmetic reads.

    Raises:
        ValueError: if `backend` cannot run on these tensors.
    """
    check_choice("backend", backend, BACKENDS)
    given = [t for t in tensors if t is not None]
    device, has_fp64 = given[0].device, any(t.dtype == torch.float64 for t in given)
    if device.type == "meta":
        if backend != "auto" or stands_for(device) == device:
            raise ValueError(
                f"backend={backend!r} needs values, but got tensors on the meta device; move them, or leave backend "
                f"out inside of `with on_meta(device):`, which only allocates what the loss would on that device"
            )
        return META
    if backend == "auto":
        fits = device.type == "cuda" and torch.version.hip is None and TRITON_IS_INSTALLED and not has_fp64
        return "triton" if fits else "torch"
    if backend == "torch":
        return backend
    if not TRITON_IS_INSTALLED:
        raise ValueError(
            f"backend={backend!r} needs the package triton, which is not installed; install it or use 'torch'"
        )
    if has_fp64:
        raise ValueError(f"backend={backend!r} computes in fp32, but an input is fp64; convert it or use 'torch'")
    if device.type != "cuda" and not (device.type == "cpu" and runs_interpreted()):
        raise ValueError(
            f"backend={backend!r} needs CUDA tensors, but got them on {device}; move them, use 'torch', or set "
            f"TRITON_INTERPRET=1 before Python starts to interpret the kernels on a CPU"
        )
    return backend


def check_group(backend: str, group: object, student_ids: int, teacher_ids: int | None) -> None:
    """Check a process group whose processes hold shards of the vocabulary, and that `backend` can work on these.

    Raises:
        ValueError: if `backend` cannot, or the models' shards do not cover the same ids.
    """
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not part of the group given; call with a group that it belongs to")
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a torch.distributed.ProcessGroup or None, but got {type(group).__name__}")
    if backend != "triton":
        raise ValueError(
            f"group= works with backend='triton' (CUDA tensors, or TRITON_INTERPRET=1), but {backend!r} was asked for "
            f"or chosen; use that, or gather the logits and leave group out"
        )
    is_last = dist.get_rank(group) == dist.get_world_size(group) - 1
    if teacher_ids is not None and teacher_ids != student_ids and not is_last:
        raise ValueError(
            f"every shard but the last must hold the same ids of both models, but this one has {student_ids} of the "
            f"student and {teacher_ids} of the teacher; shard both vocabularies at the same ids"
        )


def runs_interpreted() -> bool:
    """Return whether Triton interprets its kernels, as TRITON_INTERPRET=1 asks for."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def check_rows(name: str, tensor: Tensor, width: str, labels: Tensor | None) -> None:
    """Check that a tensor is 2-D or 3-D, floating, not empty in its last dimension, and has one label per row."""
    check_tensor(name, tensor)
    if tensor.dim() not in (2, 3) or tensor.shape[-1] == 0:
        raise ValueError(f"{name} must be [N, {width}] or [B, S, {width}], but got {list(tensor.shape)}")
    check_floating(name, tensor)
    if labels is not None:
        check_tensor("labels", labels)
    if labels is not None and labels.shape != tensor.shape[:-1]:
        raise ValueError(
            f"labels must have one entry per row of {name}, {list(tensor.shape[:-1])}, but got {list(labels.shape)}"
        )


def check_tensor(name: str, value: object) -> None:
    """Check that `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, but got {type(value).__name__}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Check that a value is a tensor of floating-point numbers."""
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, but got {tensor.dtype}")


def check_labels(labels: Tensor, vocab: int | None, ignore_index: int) -> Tensor:
    """Return flat int64 labels ``[N]``, contiguous; their values are checked if `vocab` is known."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, but got {labels.dtype}")
    # a flat view may have any stride, 0 too, and the Triton kernels read one label after the other
    labels = labels.reshape(-1).long().contiguous()
    if vocab is not None and not torch.compiler.is_compiling():  # there they have no values yet
        check_label_values(labels, vocab, ignore_index)
    return labels


def check_label_values(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Check that every label is an id or ignored, on the CPU only: elsewhere that would wait for the device."""
    if not host_can_read(labels.device):
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if wrong.any():
        raise ValueError(
            f"labels must lie in [0, {vocab}) or equal ignore_index={ignore_index}, "
            f"but one is {labels[wrong][0].item()}"
        )


def check_teacher_present(name: str, tensor: object, objective: Objective) -> None:
    """Check that a teacher is given where the objective has a part of it."""
    if tensor is None and objective.kd_ratio > 0.0:
        raise ValueError(f"kd_ratio={objective.kd_ratio} needs a teacher, but {name} is None; pass it or kd_ratio=0")


def check_teacher(name: str, tensor: Tensor, like: Tensor | None) -> None:
    """Check that a tensor is floating, frozen, and has the leading shape and device of `like`."""
    check_floating(name, tensor)
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require grad, the teacher is not trained; pass {name}.detach()")
    if like is not None and (tensor.shape[:-1] != like.shape[:-1] or tensor.shape[-1] == 0):
        raise ValueError(
            f"{name} must have the student's leading shape {list(like.shape[:-1])}, but got {list(tensor.shape)}"
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} must be on the student's device {like.device}, but is on {tensor.device}")


def check_head(model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return hidden states, head and bias in one dtype: autocast's where it is on, else the one the first two share."""
    check_floating(f"{model}_weight", weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{model}_weight must be [V, {hidden.shape[-1]}] to fit {model}_hidden, but got {list(weight.shape)}"
        )
    if bias is not None:
        check_floating(f"{model}_bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{model}_bias must be [V] = [{weight.shape[0]}], but got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{model}_{name} must be on the device of {model}_hidden, {hidden.device}, but is on {tensor.device}"
            )
    hidden, weight = _autocast(hidden), _autocast(weight)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"{model}_hidden and {model}_weight must have one dtype, but got {hidden.dtype} and "
            f"{weight.dtype}; convert one of them or use torch.autocast"
        )
    return hidden, weight, None if bias is None else bias.to(weight.dtype)


def check_float8_source(name: str, weight: Tensor) -> None:
    """Check that a head ``[V, D]`` can be quantised."""
    check_teacher(name, weight, None)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{name} must be [V, D], but got {list(weight.shape)}")
    _check_float8_width(name, weight.shape[1])


def check_float8_head(
    hidden: Tensor, weight: Float8Weight, bias: Tensor | None
) -> tuple[Tensor, Float8Weight, Tensor | None]:
    """Return the teacher's hidden states, head and bias, of a head in 8-bit floats: as `check_head`."""
    data, scale = weight
    for name, tensor, dtype in (("data", data, FLOAT8), ("scale", scale, torch.float32)):
        check_tensor(f"teacher_weight.{name}", tensor)
        if tensor.dtype != dtype:
            raise ValueError(f"teacher_weight.{name} must be {dtype}, but got {tensor.dtype}; make it by float8_weight")
    vocab, width = scale.numel(), hidden.shape[-1]
    _check_float8_width("teacher_weight", width)
    if scale.shape != (vocab,) or data.shape != (padded(vocab), width) or not data.is_contiguous() or vocab == 0:
        raise ValueError(
            f"teacher_weight must have scale [V] and contiguous data [V rounded up to a multiple of 64, {width}] to "
            f"fit teacher_hidden, but got {list(scale.shape)} and {list(data.shape)}; make it by float8_weight"
        )
    tensors = {"weight.data": data, "weight.scale": scale, "bias": bias}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"teacher_{name} must be on the device of teacher_hidden, {hidden.device}, but is on {tensor.device}"
            )
    if bias is not None:
        check_teacher("teacher_bias", bias, None)
        if bias.shape != scale.shape:
            raise ValueError(f"teacher_bias must be [V] = [{vocab}], but got {list(bias.shape)}")
    hidden = _autocast(hidden)
    return hidden, weight, None if bias is None else bias.to(hidden.dtype)


def _check_float8_width(name: str, width: int) -> None:
    if width % WIDTH_MULTIPLE:
        raise ValueError(
            f"8-bit floats need a teacher whose hidden width is a multiple of {WIDTH_MULTIPLE}, but that of {name} is "
            f"{width}; leave its head as it is"
        )


def _autocast(tensor: Tensor) -> Tensor:
    """Cast as autocast does the operands of a linear layer: fp64 stays what it is."""
    device = autocast_type(tensor.device)
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def shared_vocab(student_vocab: int, teacher_vocab: int) -> int:
    """Return the number of leading ids that both models score.

    Sizes that differ by less than 1024 are taken for paddings of one tokenizer: both models are cut to the
    shared prefix, and one log line per pair of sizes says so (none where ``torch.compile`` traces).

    Raises:
        ValueError: if the sizes differ by more.
    """
    if student_vocab == teacher_vocab:
        return student_vocab
    if abs(student_vocab - teacher_vocab) >= MAX_PADDING:
        raise ValueError(
            f"student and teacher must score the same vocabulary, but the student has {student_vocab} ids "
            f"and the teacher {teacher_vocab}; distil between models that share a tokenizer"
        )
    if not torch.compiler.is_compiling():
        _report_cut(student_vocab, teacher_vocab)
    return min(student_vocab, teacher_vocab)


@cache
def _report_cut(student_vocab: int, teacher_vocab: int) -> None:
    """Log that vocabularies are cut, once per pair of sizes."""
    _log.warning(
        "The student scores %d ids and the teacher %d: taken for paddings of one tokenizer, both are cut to "
        "the first %d ids.",
        student_vocab,
        teacher_vocab,
        min(student_vocab, teacher_vocab),
    )
