"""What linear_kd_loss must not compute or hold."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.grid_checks import make_inputs
from torchtune_kd.kernels import linear_kd_loss
from torchtune_kd.kernels._plan import chunk_size


class Recorder(TorchDispatchMode):
    """Matrix products as (rows, inner, columns), and every allocation's number of elements."""

    def __init__(self):
        self.products, self.allocated = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.products.append((a.shape[0], a.shape[1], b.shape[1]))
        if isinstance(out, torch.Tensor) and not func._schema.is_mutable and not func.is_view:
            self.allocated.append(tuple(out.shape))
        return out


# V is large enough for a block of rows to be a fraction of a chunk.
N, V, D, TEACHER_D, CHUNK = 600, 8192, 16, 24, 128


def record(trainable, grad=True, metrics=("num_tokens",)):
    inputs = make_inputs(N, V, D, TEACHER_D, trainable=trainable, ignored=2)
    inputs["student_bias"] = inputs["teacher_bias"] = None
    with Recorder() as recorder, torch.set_grad_enabled(grad):
        loss, _ = linear_kd_loss(**inputs, chunk_tokens=CHUNK, kd_ratio=0.5, return_metrics=metrics)
        if grad:
            loss.backward()
    return recorder


def logits_products(recorder):
    """Rows that went through the products with V columns, by inner width."""
    return {
        width: sum(rows for rows, inner, columns in recorder.products if (inner, columns) == (width, V))
        for width in (D, TEACHER_D)
    }


def test_only_valid_tokens_are_multiplied_and_a_frozen_head_gets_no_gradient():
    recorder = record(trainable=False)
    valid = N // 2
    assert logits_products(recorder) == {D: valid, TEACHER_D: valid}
    hidden_grad = [rows for rows, inner, columns in recorder.products if (inner, columns) == (V, D)]
    assert sum(hidden_grad) == valid
    assert not [p for p in recorder.products if p[0] == V]
    assert (V, D) not in recorder.allocated


def test_a_trainable_head_gets_one():
    recorder = record(trainable=True)
    head_grad = [inner for rows, inner, columns in recorder.products if (rows, columns) == (V, D)]
    assert sum(head_grad) == N // 2


def test_without_grad_no_gradient_is_computed():
    recorder = record(trainable=True, grad=False)
    assert logits_products(recorder) == {D: N // 2, TEACHER_D: N // 2}
    assert len(recorder.products) == 2 * -(-N // 2 // CHUNK)


@pytest.mark.parametrize("trainable", [False, True])
def test_one_chunk_of_logits_per_model_and_blocks_beside(trainable):
    recorder = record(trainable, metrics=True)
    vocabulary_wide = [shape for shape in recorder.allocated if shape and shape[-1] == V and len(shape) == 2]
    assert [shape for shape in vocabulary_wide if shape[0] > CHUNK // 2] == [(CHUNK, V), (CHUNK, V)]
    assert max(rows for rows, *_ in recorder.products if rows != V) <= CHUNK


def test_chunks_are_equal_multiples_of_128_within_the_budget():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert chunk_size(8192, 128256, 4, cuda) == 2048
    assert chunk_size(2100, 128256, 4, cuda) == 1152
    assert chunk_size(100, 128256, 4, cuda) == 128
    assert chunk_size(1024, 49152, 4, cpu) == 1024
    assert chunk_size(10**6, 10**6, 8, cpu) == 128
