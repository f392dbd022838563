"""What the loss of meta tensors allocates, multiplies and tells, beside what a device does.

Legend: N tokens, V vocabulary, D hidden width.
"""

import math

import pytest
import torch
from allocations import Memory

from torchtune_kd.kernels import METRICS, linear_kd_loss, on_meta, softmax_kd_loss
from torchtune_kd.kernels._plan import chunk_size, rows_per_block

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
N, V, D, TEACHER_D = 700, 4000, 16, 24
CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))


def make_inputs(device, dtype=BF16, trainable=True, n=N, v=V):
    """Hidden states and heads of both models, the student's bias, labels on the CPU of which a third is ignored."""
    shapes = {
        "student_hidden": (n, D),
        "student_weight": (v, D),
        "teacher_hidden": (n, TEACHER_D),
        "teacher_weight": (v, TEACHER_D),
        "student_bias": (v,),
    }
    inputs = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    if device != META:
        for tensor in inputs.values():
            tensor.normal_()
    for name in ("student_hidden", "student_weight", "student_bias") if trainable else ("student_hidden",):
        inputs[name].requires_grad_()
    labels = torch.arange(n) % v
    labels[::3] = -100
    return {**inputs, "labels": labels}


def run(inputs, **settings):
    """Forward and, if something is trained, backward; the loss and the gradients."""
    loss, metrics = linear_kd_loss(**inputs, kd_ratio=0.5, temperature=2.0, return_metrics=METRICS, **settings)
    leaves = [tensor for tensor in inputs.values() if tensor.requires_grad and torch.is_grad_enabled()]
    grads = torch.autograd.grad(2 * loss.sum(), leaves) if leaves else ()
    return [loss, *metrics.values(), *grads]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("trainable", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("chunk_tokens", [None, 128])
def test_memory_and_products_are_those_of_the_device(chunk_tokens, dtype, reduction, trainable, grad):
    found = {}
    settings = {"reduction": reduction, "chunk_tokens": chunk_tokens}
    for device in (CPU, META):
        inputs = make_inputs(device, dtype, trainable)
        with torch.set_grad_enabled(grad), Memory(device) as memory:
            if device == CPU:
                results = run(inputs, **settings)
            else:
                with on_meta(CPU):
                    results = run(inputs, **settings)
        found[device] = memory.products, memory.peak, [(t.shape, t.dtype) for t in results]
    assert found[META][0] == found[CPU][0]
    assert found[META][2] == found[CPU][2]
    assert found[META][1] == pytest.approx(found[CPU][1], rel=0.02)


def test_a_gpu_has_its_own_chunks_and_no_workspace():
    n, v = 5000, 128256
    inputs = make_inputs(META, n=n, v=v)
    valid = n - math.ceil(n / 3)
    chunks = {}
    for device in (CPU, CUDA):
        with Memory(META) as memory, on_meta(device), torch.no_grad():
            linear_kd_loss(**inputs)
        rows = [a[0] for _, a, b in memory.products if b == (D, v)]
        assert sum(rows) == valid
        chunks[device.type] = rows[0]
        workspace = 6 * rows_per_block(v, CPU) * v * 4
        assert (workspace in memory.made) == (device == CPU)
        buffers = [size for size in memory.made if size == rows[0] * v * 2]
        assert len(buffers) == 2
    assert chunks == {"cpu": 512, "cuda": 1792}
    assert chunks["cuda"] == chunk_size(valid, v, 4, CUDA)


def test_fp64_has_a_workspace_on_a_gpu_too():
    """Triton's kernels are for fp32 and less."""
    with Memory(META) as memory, on_meta(CUDA), torch.no_grad():
        linear_kd_loss(**make_inputs(META, F64))
    assert 6 * N_VALID * V * 8 in memory.made


N_VALID = N - math.ceil(N / 3)


@pytest.mark.parametrize("target", ["cpu", CUDA])
@pytest.mark.parametrize("vocab", [4096, 4000])
def test_it_accounts_for_what_the_arithmetic_moves(vocab, target):
    sizes = []
    with on_meta(target, account=sizes.append):
        linear_kd_loss(**make_inputs(META, v=vocab), chunk_tokens=128)
    assert len(sizes) == math.ceil(N_VALID / 128)
    assert sum(sizes) == N_VALID * vocab * 2 * (2 + 2 + 1)  # both models' logits twice, the gradient once


def test_labels_on_the_meta_device_are_all_valid():
    inputs = make_inputs(META)
    inputs["labels"] = inputs["labels"].to(META)
    with Memory(META) as memory, on_meta("cuda"):
        linear_kd_loss(**inputs)
    assert sum(a[0] for _, a, b in memory.products if b == (D, V)) == N


def test_cross_entropy_alone_needs_no_teacher():
    inputs = {name: t for name, t in make_inputs(META).items() if not name.startswith("teacher")}
    with on_meta("cpu"):
        loss = linear_kd_loss(**inputs, teacher_hidden=None, teacher_weight=None, kd_ratio=0.0)
    assert loss.is_meta and loss.requires_grad


def test_autocast_of_a_device_is_none_of_its_business():
    inputs = make_inputs(META, F32)
    with on_meta("cuda"), torch.autocast("cpu", enabled=False):
        assert [t.dtype for t in run(inputs)[-3:]] == [F32] * 3


@pytest.mark.parametrize(
    ("inside", "call", "sentence"),
    [
        (False, lambda inputs: linear_kd_loss(**inputs), "backend='auto' needs values, but got tensors on the meta"),
        (True, lambda inputs: linear_kd_loss(**inputs, backend="torch"), "backend='torch' needs values"),
        (True, lambda inputs: linear_kd_loss(**inputs, backend="triton"), "backend='triton' needs values"),
        (True, lambda inputs: softmax_kd_loss(*inputs_of_logits()), "on_meta knows the loss from hidden states alone"),
        (
            False,
            lambda inputs: softmax_kd_loss(*inputs_of_logits()),
            "needs values, but got tensors on the meta device",
        ),
    ],
)
def test_meta_tensors_are_refused_elsewhere(inside, call, sentence):
    inputs = make_inputs(META)
    with pytest.raises(ValueError, match=sentence):
        if inside:
            with on_meta("cpu"):
                call(inputs)
        else:
            call(inputs)


def inputs_of_logits():
    return torch.empty(2, 3, 8, device=META).unbind()


def test_nothing_is_left_behind():
    """Neither by an error, nor inside of another one, nor for tensors that have values."""
    sizes = chunk_size(10**6, V, 4, META), rows_per_block(V, META)
    with pytest.raises(RuntimeError, match="stop"), on_meta(CPU):
        assert rows_per_block(V, META) == rows_per_block(V, CPU) != rows_per_block(V, CUDA)
        with on_meta(CUDA):
            assert rows_per_block(V, META) == rows_per_block(V, CUDA)
            assert chunk_size(10**6, V, 4, CPU) != chunk_size(10**6, V, 4, META)
        assert rows_per_block(V, META) == rows_per_block(V, CPU)
        inputs = make_inputs(CPU)
        inside = linear_kd_loss(**inputs)
        raise RuntimeError("stop")
    assert (chunk_size(10**6, V, 4, META), rows_per_block(V, META)) == sizes
    assert torch.equal(inside, linear_kd_loss(**inputs))
