"""What a GPU would be handed, traced without one: fake CUDA tensors, in processes that do not interpret the kernels.

Where there is no CUDA device, PyTorch cannot record gradients of CUDA tensors, fake ones included. There the forward
pass is traced for CUDA, and both passes of ``backend="triton"`` on CPU tensors, which are only traced and never run.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

PRELUDE = """
import json, torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torchtune_kd.kernels import _checks, linear_kd_loss, linear_sparse_kd_loss, softmax_kd_loss
from torchtune_kd.kernels._operators import NAMESPACE

N, V, D = 8, 1000, 16
ops, seen = getattr(torch.ops, NAMESPACE), []

def make(device, grad, labels_on=None):
    def tensor(*shape, grad=False):
        return torch.empty(shape, dtype=torch.bfloat16, device=device, requires_grad=grad)
    labels = torch.zeros(N, dtype=torch.int64, device=labels_on or device)
    return {
        "softmax": (tensor(N, V, grad=grad), tensor(N, V), labels),
        "linear": (tensor(N, D, grad=grad), tensor(V, D, grad=grad), tensor(N, 2 * D), tensor(V, 2 * D), labels),
    }

def run(name, inputs, **settings):
    function = {"softmax": softmax_kd_loss, "linear": linear_kd_loss, "sparse": linear_sparse_kd_loss}[name]
    return function(*inputs, divergence="jsd", kd_ratio=0.5, **settings)

def keep(graph, example):
    for node in graph.graph.nodes:
        if NAMESPACE + "." in str(node.target):
            seen.append([str(node.target).split(".")[1], "triton" in node.args])
    return graph

def traced(name, inputs, compiler, **settings):
    seen.clear()
    torch._dynamo.reset()
    loss = torch.compile(lambda *x: run(name, x, **settings), fullgraph=True, backend=compiler)(*inputs)
    if loss.requires_grad:
        loss.sum().backward()
        assert all(t.grad.shape == t.shape and t.grad.dtype == t.dtype for t in inputs if t.requires_grad)
    return {"ops": list(seen), "device": loss.device.type, "shape": list(loss.shape), "dtype": str(loss.dtype)}

boxed = aot_autograd(fw_compiler=keep, bw_compiler=keep)
"""


def trace(code: str) -> object:
    """Return what `code` prints as JSON, with the names of `PRELUDE`."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", PRELUDE + code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


FORWARD = """
def stored(hidden, weight, *_, labels):
    ids = torch.empty(N, 4, dtype=torch.int64, device="cuda")
    log_probs, tail = torch.empty(N, 4, device="cuda"), torch.empty(N, device="cuda")
    return hidden, weight, ids, log_probs, tail, labels

found = {}
with FakeTensorMode():
    for labels_on in ("cuda", "cpu"):
        for reduction in ("mean", "none"):
            calls = make("cuda", False, labels_on)
            *tensors, labels = calls["linear"]
            calls["sparse"] = stored(*tensors, labels=labels)
            for name, inputs in calls.items():
                found[f"{name} {labels_on} {reduction}"] = traced(name, inputs, keep, reduction=reduction)
print(json.dumps(found))
"""


def test_auto_is_triton_for_cuda_tensors():
    found = trace(FORWARD)
    assert len(found) == 12
    for key, graph in found.items():
        name, _, reduction = key.split()
        assert graph["ops"] == [["softmax_kd" if name == "softmax" else "linear_kd", True]], key
        assert graph["device"] == "cuda"
        assert graph["shape"] == ([8] if reduction == "none" else [])
        assert graph["dtype"] == "torch.float32"


@pytest.mark.slow
def test_auto_is_torch_for_cpu_tensors():
    code = """
graphs = {name: traced(name, inputs, boxed)["ops"] for name, inputs in make("cpu", False).items()}
print(json.dumps(graphs))
"""
    assert trace(code) == {"softmax": [["softmax_kd", False]], "linear": [["linear_kd", False]]}


BACKWARD = """
_checks.runs_interpreted = lambda: True  # "triton" on CPU tensors, which nothing runs
device = "cuda" if torch.cuda.is_available() else "cpu"
with FakeTensorMode():
    found = {
        f"{name} {reduction}": traced(name, inputs, boxed, reduction=reduction, backend="triton")
        for reduction in ("mean", "none")
        for name, inputs in make(device, True).items()
    }
print(json.dumps(found))
"""


@pytest.mark.skipif(torch.__version__ < "2.7", reason="PyTorch 2.6 does not compile functions of fake tensors")
def test_forward_and_backward_are_in_the_graph():
    found = trace(BACKWARD)
    ops = {key: graph["ops"] for key, graph in found.items()}
    assert ops == {
        "softmax mean": [["softmax_kd", True], ["softmax_kd_backward", True]],
        "softmax none": [["softmax_kd", True], ["softmax_kd_backward", True]],
        "linear mean": [["linear_kd", True], ["linear_kd_backward", True]],
        "linear none": [["linear_kd", True], ["linear_kd_recomputed", True]],
    }


@pytest.mark.slow
def test_operators_stay_on_the_device():
    """The fake operators with gradients wanted, which autograd does not reach without a CUDA device."""
    code = """
from torchtune_kd.kernels import Objective
from torchtune_kd.kernels._packing import pack
from torchtune_kd.kernels._plan import Plan
plan = pack(Plan(Objective("jsd", 0.5, 2.0, 0.5), ("kl", "kd_loss"), V, "mean", True, True))
with FakeTensorMode():
    inputs = make("cuda", False)
    student, teacher, labels = inputs["softmax"]
    *results, grad = ops.softmax_kd(student, teacher, labels, plan, "triton", None)
    back = ops.softmax_kd_backward(grad, results[0], results[2], "mean", "triton", True)
    hidden, weight, teacher_hidden, teacher_weight, _ = inputs["linear"]
    heads = hidden, weight, None, [teacher_hidden, teacher_weight], "++--", labels.cpu()
    more = ops.linear_kd(*heads, plan, "hidden,weight", 4, "triton", None)
    dtypes = hidden.dtype, weight.dtype
    last = ops.linear_kd_backward(*more[3:], more[0], more[2], "mean", "hidden,weight", *dtypes, "triton", True)
    tensors = {"results": results, "grads": [grad, back], "linear": more, "last": last}
    print(json.dumps({k: [[str(t.device), str(t.dtype), list(t.shape)] for t in v] for k, v in tensors.items()}))
"""
    n, v, d, bf16, f32 = 8, 1000, 16, "torch.bfloat16", "torch.float32"
    results = [["cuda:0", f32, []], ["cuda:0", f32, [2]], ["cuda:0", "torch.int64", []]]
    nothing = ["cuda:0", bf16, [0]]
    found = trace(code)
    assert found["results"] == results
    assert found["grads"] == [["cuda:0", bf16, [n, v]]] * 2
    assert found["linear"] == [*results, ["cuda:0", bf16, [n, d]], ["cuda:0", f32, [v, d]], nothing]
    assert found["last"] == [["cuda:0", bf16, [n, d]], ["cuda:0", bf16, [v, d]], nothing]


@pytest.mark.slow
def test_triton_on_the_cpu_is_refused_where_nothing_interprets():
    code = """
try:
    run("softmax", make("cpu", False)["softmax"], backend="triton")
except ValueError as error:
    print(json.dumps(str(error)))
"""
    assert "backend='triton' needs CUDA tensors" in trace(code)


GPU = """
import warnings
from torchtune_kd.kernels import METRICS
torch.manual_seed(0)

def fill(inputs):
    for tensor in inputs[:-1]:
        tensor.data.normal_()
    inputs[-1].copy_(torch.arange(N) * 37 % V)
    inputs[-1][::3] = -100

calls, counts = [], []
for labels_on in ("cpu", "cuda"):
    for name, inputs in make("cuda", True, labels_on).items():
        fill(inputs)
        for settings in (
            {}, {"reduction": "none"}, {"reduction": "sum", "temperature": 2.0}, {"return_metrics": METRICS},
            {"backend": "triton", **({"chunk_tokens": 3} if name == "linear" else {})},
            *([{"teacher_head_dtype": "float8"}] if name == "linear" else []),
        ):
            calls.append((name, inputs, settings))

def waits(name, inputs, settings):
    return name == "linear" and inputs[-1].is_cuda  # for the number of valid tokens

def call(name, inputs, settings):
    found = run(name, inputs, **settings)
    loss = found[0] if isinstance(found, tuple) else found
    loss.backward(torch.ones_like(loss))

for arguments in calls:  # kernels are compiled and loaded, and cuBLAS starts
    call(*arguments)
torch.cuda.synchronize()
torch.cuda.set_sync_debug_mode("error")
try:
    caught = False
    try:
        torch.ones((), device="cuda").item()
    except RuntimeError:
        caught = True
    for arguments in calls:
        if waits(*arguments):
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                call(*arguments)
            counts.append(sum("synchronizing" in str(warning.message) for warning in found))
            torch.cuda.set_sync_debug_mode("error")
        else:
            call(*arguments)
finally:
    torch.cuda.set_sync_debug_mode("default")
print(json.dumps([caught, len(calls), counts]))
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_no_call_waits_for_the_gpu_but_for_the_number_of_valid_tokens():
    caught, calls, counts = trace(GPU)
    assert caught, "the debug mode does not see a synchronisation"
    assert calls == 22
    # reduction "none" with a trained head finds the valid tokens again in backward
    assert counts == [1, 2, 1, 1, 1, 1]


CAPTURE = """
torch.manual_seed(0)
found = {}
for name, inputs in make("cuda", True).items():
    *tensors, labels = inputs
    for tensor in tensors:
        tensor.data.normal_()
    leaves = [tensor for tensor in tensors if tensor.requires_grad]

    def step():
        loss = run(name, inputs)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def fill(first):
        labels.copy_(torch.arange(N) * 37 % V)
        labels[first::3] = -100

    fill(0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # kernels are compiled and loaded before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    fill(1)  # other tokens are ignored than in the batch captured
    graph.replay()
    expected = step()
    found[name] = all(torch.allclose(a, b, rtol=1e-2, atol=1e-4) for a, b in zip(captured, expected))
    inputs = (*tensors, labels.cpu())
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            step()
    except ValueError as error:
        found[f"{name} refused"] = "are on the CPU" in str(error)
print(json.dumps(found))
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_captured_call_follows_the_labels():
    assert trace(CAPTURE) == dict.fromkeys(("softmax", "softmax refused", "linear", "linear refused"), True)
