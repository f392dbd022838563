"""One rule for vocabularies of different size."""

import logging
from functools import cache

import torch

# Embedding tables of one tokenizer are padded to different multiples (Qwen2.5: 151936 and 152064).
MAX_PADDING = 1024

_log = logging.getLogger(__name__)


def shared_vocab(student_vocab: int, teacher_vocab: int) -> int:
    """Number of leading ids that both models score.

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
    _log.warning(
        "The student scores %d ids and the teacher %d: taken for paddings of one tokenizer, both are cut to "
        "the first %d ids.",
        student_vocab,
        teacher_vocab,
        min(student_vocab, teacher_vocab),
    )
