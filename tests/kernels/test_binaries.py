"""The Triton kernels as GPUs get them: compiled here for GPUs that are not, by the launches of the package itself.

Everything runs in processes that do not interpret the kernels. Legend: N tokens, V vocabulary.
"""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from packaging.version import Version

from helpers.checkout import CHECKOUT, benchmarks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
OLD_TRITON = pytestmark.args[0] or Version(version("triton")) < Version("3.9")

WIDE = "128"
# Bytes of a thread. Triton before 3.9 puts two registers of 4 of the 534 binaries, all symmetric KL, into memory.
SPILLED = 8 if OLD_TRITON else 0

# One of each kind: both ends of the two-pass kernels' register use, a loss in one read, the three passes with most
# registers, metrics in either, an output head of the student alone, rows with scales of their own,
# the scaling of a stored gradient, and shards of rows.
SUBSET = (
    "forward_kl T=1 ce gradient",
    "symmetric_kl T=2 ce gradient",
    "reverse_kl T=2 loss",
    "jsd T=2 ce gradient",
    "skew_reverse_kl T=2 gradient unlabelled all-metrics",
    "tvd T=1 gradient row-scale",
    "ce gradient student-metrics",
    "scale",
    "symmetric_kl T=2 ce gradient shards",
    "jsd T=2 ce gradient all-metrics shards",
)


def compiling(code: str, *args: str) -> object:
    """Return what `code` prints as JSON, in a process that compiles; it may use `binaries`, the benchmark's module."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    start = f"import json, sys; sys.path.append({str(CHECKOUT)!r}); from benchmarks import binaries\n"
    command = [sys.executable, "-W", "ignore", "-c", start + code, *args]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


COMPILE = """
from dataclasses import asdict
names = sys.argv[1:]
cases = [case for case in binaries.all_cases() if not names or case.name in names]
found = binaries.reports(cases, binaries.ARCHITECTURES, jobs=2)
print(json.dumps([asdict(report) | {"narrow": report.narrow} for report in found]))
"""


def check(reports: list[dict]) -> None:
    assert sum(report["spilled_bytes"] > 0 for report in reports) <= (4 if OLD_TRITON else 0)
    for report in reports:
        assert report["spilled_bytes"] <= SPILLED, report
        assert report["loads"].get(WIDE, 0) > 0 or not report["block"], report
        assert report["narrow"] == 0, report
        assert 0 < report["registers"] <= (report["most_registers"] or 255), report
        assert report["warps_per_sm"] >= 8, report  # two per scheduler: one computes while the other waits


def test_some_binaries_spill_nothing_and_load_128_bits():
    reports = compiling(COMPILE, *SUBSET)
    assert {(r["case"], r["arch"]) for r in reports} == {(c, arch) for c in SUBSET for arch in (80, 90)}
    check(reports)


@pytest.mark.slow
def test_no_binary_spills_and_all_load_128_bits():
    reports = compiling(COMPILE)
    # 7 divergences x T x cross-entropy x gradient x metrics, and what the other cases add
    assert len(reports) >= 2 * (112 + 20 + 100)
    assert {r["kernel"] for r in reports} == set(compiling(KERNELS))
    check(reports)


KERNELS = """
import triton, torchtune_kd.kernels
modules = [module for name, module in sys.modules.items() if name.startswith("torchtune_kd.kernels.")]
values = [value for module in modules for value in vars(module).values()]
print(json.dumps([v.fn.__name__ for v in values if isinstance(v, triton.JITFunction) and "_kernel" in v.fn.__name__]))
"""


@pytest.mark.slow
def test_a_spill_and_narrow_loads_would_be_seen():
    code = """
from unittest.mock import patch
case = next(case for case in binaries.all_cases() if case.name == "jsd T=2 ce gradient")
with patch.object(binaries.rows, "blocks_for", lambda *_: binaries.Blocks(4096, 4, 40)):
    tight, = binaries.reports([case], [90])
odd, = binaries.reports([case], [90], vocab=1025)
print(json.dumps([tight.spilled_bytes, tight.narrow, odd.narrow]))
"""
    spilled, narrow, odd = compiling(code)
    assert spilled > 0
    assert narrow == 0
    assert odd > 0  # rows of odd length start anywhere


def test_every_launch_has_multiply_adds_fused():
    """Triton 3.10 no longer does it by itself."""
    code = """
found = {binary for case in binaries.all_cases() for binary in binaries.binaries_of(case)}
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
found = {binary for case in binaries.all_cases() for binary in binaries.binaries_of(case)}
unknown = sorted({name for binary in found for name, _ in binary.options if name not in known})
compiled = []
for name in sys.argv[1:]:
    case = next(case for case in binaries.all_cases() if case.name == name)
    compiled += [binaries.compiled(binary, *target).metadata.warp_size for binary in binaries.binaries_of(case)]
print(json.dumps([unknown, compiled]))
"""
    # older ones link with a program of ROCm, which is not here
    names = () if OLD_TRITON else ("jsd T=2 ce gradient", "symmetric_kl T=2 ce gradient shards", "scale")
    unknown, lanes = compiling(code, *names)
    assert not unknown
    assert OLD_TRITON or (len(lanes) >= 5 and set(lanes) == {64})


def test_no_difference_of_products_is_contracted():
    """a·c - b·c as one multiply-add and a product is not 0 where a = b, and equal models are not where it is."""
    code = """
import re
answer = {}
for name in sys.argv[1:]:
    case = next(case for case in binaries.all_cases() if case.name == name)
    for binary in binaries.binaries_of(case):
        ptx = binaries.compiled(binary, 90).asm["ptx"]
        factors = {m[1]: m[2] for m in re.finditer(r"mul\\.f32\\s+(%[rf]\\d+), (\\S+), \\S+;", ptx)}
        negated = {m[1]: m[2] for m in re.finditer(r"neg\\.f32\\s+(%[rf]\\d+), (%[rf]\\d+);", ptx)}
        fused = re.findall(r"fma\\.rn\\.f32\\s+%[rf]\\d+, (\\S+), \\S+, (%[rf]\\d+);", ptx)
        key = f"{name}: {binary.kernel}"
        answer[key] = sum(negated.get(addend) in factors and factors[negated[addend]] == c for c, addend in fused)
        assert fused or "results" in key, key
print(json.dumps(answer))
"""
    cases = (
        "forward_kl T=1 ce gradient",
        "forward_kl T=1 loss",
        "reverse_kl T=2 loss",
        "tvd T=2 ce gradient all-metrics",
        "symmetric_kl T=2 ce gradient shards",
        "symmetric_kl T=2 ce loss shards",
    )
    found = compiling(code, *cases)
    assert found and not any(found.values()), found


def test_chunks_of_logits_of_an_odd_vocabulary_are_loaded_128_bits_at_a_time():
    """GPT-2's 50257 ids, by the launches of ``linear_kd_loss``: its rows are padded."""
    code = """
import torch
from torchtune_kd.kernels import Objective
from torchtune_kd.kernels._linear import Heads, NeededGradients, linear_forward
vocab, n, width = 50257, 4096, 64
tensor = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")
heads = Heads(tensor(n, width), tensor(vocab, width), None, tensor(n, width), tensor(vocab, width), None)
labels = torch.empty(n, dtype=torch.int64, device="meta")
answer = []
for name in ("forward_kl", "jsd"):
    plan = binaries.Plan(Objective(name, temperature=2.0, kd_ratio=0.5), (), vocab, "mean", True, True)
    with binaries.recorded() as found:
        linear_forward(heads, labels, plan, 2048, "triton", NeededGradients(True, False, False))
    report = binaries.compile_binary(name, found[0], 90)
    answer.append([len(set(found)), report.narrow, report.loads.get(binaries.WIDE, 0), report.spilled_bytes])
print(json.dumps(answer))
"""
    for binaries, narrow, wide, spilled in compiling(code):
        assert (binaries, narrow) == (1, 0)
        assert wide > 0
        assert spilled <= SPILLED


# registers of a thread, warps, bytes of shared memory -> programs, as NVIDIA's occupancy calculator has them
OCCUPANCY = [
    (80, 32, 8, 0, 8),  # by warps: 64
    (80, 64, 8, 0, 4),  # by registers, without a rest
    (80, 65, 8, 0, 3),  # pieces of 256: 65 take 72
    (80, 168, 4, 0, 3),
    (90, 255, 4, 0, 2),
    (80, 16, 1, 0, 32),  # by programs
    (80, 32, 4, 40 * 1024, 4),  # by shared memory: 164 KB
    (90, 32, 4, 40 * 1024, 5),  # 228 KB
]


@pytest.mark.parametrize(("arch", "registers", "warps", "shared", "programs"), OCCUPANCY)
def test_occupancy(arch, registers, warps, shared, programs):
    assert benchmarks("binaries").programs_per_sm(arch, registers, warps, shared) == programs


@pytest.mark.slow
def test_a_new_number_of_tokens_compiles_nothing():
    code = """
def binaries_of(call):
    with binaries.recorded() as found:
        call()
    return found

import torch
from torchtune_kd.kernels._softmax import softmax_forward
from torchtune_kd.kernels import Objective

def cut(n):  # [2, N, V] without the last position, as next-token losses cut it: no view makes it [2 * (N - 1), V]
    logits = torch.empty(2, n + 1, binaries.VOCAB, dtype=torch.bfloat16, device="meta")[:, :-1]
    labels = torch.empty(2 * n, dtype=torch.int64, device="meta")
    plan = binaries.Plan(Objective("jsd", kd_ratio=0.5), (), binaries.VOCAB, "mean", True, True)
    softmax_forward(logits, logits, labels, plan, "triton")

calls = {case.name: lambda n, case=case: binaries.binaries_of(case, n_tokens=n) for case in binaries.all_cases()}
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
    """`binaries.specialise` against Triton's own binder, whose name and place changed with its versions."""
    code = """
import triton, torch
from triton.runtime import jit
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
answer = None
if hasattr(triton.JITFunction, "_pack_args"):
    answer, backend = [], make_backend(GPUTarget("cuda", 90, 32))
    ours = binaries.specialise
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
    binaries.specialise = both
    for case in binaries.all_cases():
        binaries.binaries_of(case)
print(json.dumps(answer))
"""
    answer = compiling(code)
    if answer is None:
        pytest.skip("this Triton has another binder")
    assert len(answer) > 100 and all(answer)


def test_refuses_to_interpret():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "benchmarks.binaries", "scale"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("interprets its kernels and compiles nothing; unset it")
    assert not done.stdout
