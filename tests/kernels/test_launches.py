"""Launches: options of either maker's GPUs, one binary for any number of tokens, specialised as Triton does it.

Everything runs in processes that do not interpret the kernels. Legend: N tokens, V vocabulary.
"""

import pytest

from helpers.compiling import KERNELS, OLD_TRITON, compiling, needs_triton

pytestmark = needs_triton


def test_every_launch_has_multiply_adds_fused():
    """Triton 3.10 no longer does it by itself."""
    code = """
found = {binary for case in launches.all_cases() for binary in launches.binaries_of(case)}
print(json.dumps([[binary.kernel, dict(binary.options)] for binary in found]))
"""
    launches = compiling(code)
    assert {kernel for kernel, _ in launches} == set(compiling(KERNELS))
    assert all(options.pop("enable_fp_fusion") is True for _, options in launches)
    assert {frozenset(options) for _, options in launches} == {
        frozenset({"num_warps", "maxnreg"}),
        frozenset({"num_warps"}),
    }


def test_amd_knows_every_option_of_a_launch():
    """Triton refuses a launch with a word that the backend does not know; the kernels compile for an MI300."""
    code = """
import torch
from triton.compiler.compiler import make_backend
torch.version.hip = "6.4"
target = "gfx942", "hip", 64
known = vars(make_backend(binaries.backends.GPUTarget("hip", "gfx942", 64)).parse_options({}))
found = {binary for case in launches.all_cases() for binary in launches.binaries_of(case)}
unknown = sorted({name for binary in found for name, _ in binary.options if name not in known})
compiled = []
for name in sys.argv[1:]:
    case = next(case for case in launches.all_cases() if case.name == name)
    compiled += [binaries.compiled(binary, *target).metadata.warp_size for binary in launches.binaries_of(case)]
print(json.dumps([unknown, compiled]))
"""
    # older ones link with a program of ROCm, which is not here
    names = () if OLD_TRITON else ("jsd T=2 ce gradient", "symmetric_kl T=2 ce gradient shards", "scale")
    unknown, lanes = compiling(code, *names)
    assert not unknown
    assert OLD_TRITON or (len(lanes) >= 5 and set(lanes) == {64})


def test_what_the_gpu_compares_to_the_bit_is_one_binary():
    """``benchmarks.gpu`` expects equal bits of both functions, which only one and the same kernel promises."""
    code = """
import torch
from torchtune_kd.kernels import Objective
from torchtune_kd.kernels._chunks import Models
from torchtune_kd.kernels._linear import NeededGradients, linear_forward
from torchtune_kd.kernels._plan import Plan
from torchtune_kd.kernels._teachers import TeacherHead
from torchtune_kd.kernels._softmax import softmax_forward
answer = []
for vocab, dtype in ((4096, torch.bfloat16), (1088, torch.float32), (1000, torch.float32)):
    tensor = lambda *shape: torch.empty(shape, dtype=dtype, device="meta")
    teacher = TeacherHead(tensor(129, vocab), tensor(vocab, vocab), None)
    models = Models(tensor(129, vocab), tensor(vocab, vocab), None, teacher)
    labels = torch.empty(129, dtype=torch.int64, device="meta")
    plan = Plan(Objective("jsd", temperature=2.0, kd_ratio=0.5), (), vocab, "none", True, True)
    with launches.recorded() as found:
        softmax_forward(tensor(129, vocab), tensor(129, vocab), labels, plan, "triton")
        linear_forward(models, labels, plan, 48, "triton", NeededGradients(True, False, False))
    answer.append(len(set(found)))
print(json.dumps(answer))
"""
    assert compiling(code) == [1, 1, 2]


@pytest.mark.slow
def test_a_new_number_of_tokens_compiles_nothing():
    code = """
def binaries_of(call):
    with launches.recorded() as found:
        call()
    return found

import torch
from torchtune_kd.kernels import Objective
from torchtune_kd.kernels._plan import Plan
from torchtune_kd.kernels._softmax import softmax_forward

def cut(n):  # [2, N, V] without the last position, as next-token losses cut it: no view makes it [2 * (N - 1), V]
    logits = torch.empty(2, n + 1, launches.VOCAB, dtype=torch.bfloat16, device="meta")[:, :-1]
    labels = torch.empty(2 * n, dtype=torch.int64, device="meta")
    plan = Plan(Objective("jsd", kd_ratio=0.5), (), launches.VOCAB, "mean", True, True)
    softmax_forward(logits, logits, labels, plan, "triton")

calls = {case.name: lambda n, case=case: launches.binaries_of(case, n_tokens=n) for case in launches.all_cases()}
calls["cut"] = lambda n: binaries_of(lambda: cut(n))
# values that Triton specialises on: 1, multiples of 16, beyond 32 bits; and none of these
counts = (1, 2, 3, 16, 17, 4096)
different = {name: len({frozenset(call(n)) for n in counts}) for name, call in calls.items()}
print(json.dumps(different))
"""
    different = compiling(code)
    assert len(different) > 100
    assert set(different.values()) == {1}


@pytest.mark.slow
def test_specialises_as_triton_does():
    """`launches.specialise` against Triton's own binder, whose name and place changed with its versions."""
    code = """
import triton, torch
from triton.runtime import jit
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
answer = None
if hasattr(triton.JITFunction, "_pack_args"):
    answer, backend = [], make_backend(GPUTarget("cuda", 90, 32))
    ours = launches.specialise
    def both(kernel, *args, **kwargs):
        binary = ours(kernel, *args, **kwargs)
        binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*args, **kwargs, debug=False)
        _, signature, constants, attributes = kernel._pack_args(backend, dict(kwargs), bound, specialization, options)
        names = [kernel.arg_names[path[0]] for path in attributes if attributes[path]]
        constants = {kernel.arg_names[path[0]]: value for path, value in constants.items()}
        theirs = (signature, constants, names)
        answer.append(theirs == (dict(binary.signature), dict(binary.constants), list(binary.aligned)))
        return binary
    launches.specialise = both
    for case in launches.all_cases():
        launches.binaries_of(case)
print(json.dumps(answer))
"""
    answer = compiling(code)
    if answer is None:
        pytest.skip("this Triton has another binder")
    assert len(answer) > 100 and all(answer)
