"""A kernel of two passes over a row in every shape of loop, to see that the benchmark counts each of them right."""

import triton
import triton.language as tl

GROUP = tl.constexpr(8)


@triton.jit
def add_block(row, offsets, n_ids, largest, total, MASKED: tl.constexpr):
    """Add a block to the running maxima and sums, one of each for a group of ids that a thread holds."""
    if MASKED:
        logits = tl.load(row + offsets, mask=offsets < n_ids, other=-float("inf")).to(tl.float32)
    else:
        logits = tl.load(row + offsets).to(tl.float32)
    groups = tl.reshape(logits, [logits.shape[0] // GROUP, GROUP])
    new = tl.maximum(largest, tl.max(groups, 1))
    return new, total * tl.exp2(largest - new) + tl.sum(tl.exp2(groups - new[:, None]), 1)


@triton.jit
def write_block(row, out, offsets, n_ids, largest, total, MASKED: tl.constexpr):
    """Write the probabilities of a block."""
    if MASKED:
        logits = tl.load(row + offsets, mask=offsets < n_ids, other=-float("inf")).to(tl.float32)
        tl.store(out + offsets, (tl.exp2(logits - largest) / total).to(tl.bfloat16), mask=offsets < n_ids)
    else:
        logits = tl.load(row + offsets).to(tl.float32)
        tl.store(out + offsets, (tl.exp2(logits - largest) / total).to(tl.bfloat16))


@triton.jit
def softmax_kernel(student, out, n_ids, TAIL: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr):
    """Write the softmax (in powers of 2) of a row, ``[n_ids]`` in bf16.

    Args:
        TAIL: of a row that is no whole number of blocks: "masked" as all blocks are, "straight" behind the loop, or in
            another "loop".
    """
    row = tl.program_id(0).to(tl.int64) * n_ids
    student += row
    out += row
    ids = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK // GROUP], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK // GROUP], tl.float32)
    end = n_ids if TAIL == "masked" else n_ids // BLOCK * BLOCK
    for start in tl.range(0, end, BLOCK, loop_unroll_factor=UNROLL):
        largest, total = add_block(student, start + ids, n_ids, largest, total, TAIL == "masked")
    if TAIL == "straight":  # noqa: SIM102  Triton has no `and` of a constant and a value
        if end < n_ids:
            largest, total = add_block(student, end + ids, n_ids, largest, total, True)
    if TAIL == "loop":
        for start in range(end, n_ids, BLOCK):
            largest, total = add_block(student, start + ids, n_ids, largest, total, True)
    row_largest = tl.max(largest, 0)
    row_total = tl.sum(total * tl.exp2(largest - row_largest), 0)
    for start in tl.range(0, end, BLOCK, loop_unroll_factor=UNROLL):
        write_block(student, out, start + ids, n_ids, row_largest, row_total, TAIL == "masked")
    if TAIL == "straight":  # noqa: SIM102  Triton has no `and` of a constant and a value
        if end < n_ids:
            write_block(student, out, end + ids, n_ids, row_largest, row_total, True)
    if TAIL == "loop":
        for start in range(end, n_ids, BLOCK):
            write_block(student, out, start + ids, n_ids, row_largest, row_total, True)
