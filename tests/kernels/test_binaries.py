"""The Triton kernels as GPUs get them: compiled here for GPUs that are not, by the launches of the package itself.

Everything runs in processes that do not interpret the kernels. Legend: N tokens, V vocabulary.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from packaging.version import Version

from helpers.checkout import CHECKOUT, benchmarks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
OLD_TRITON = pytestmark.args[0] or Version(version("triton")) < Version("3.9")

# Bytes of a thread. Triton before 3.9 puts two registers of 4 binaries, all symmetric KL, into memory.
SPILLED = 8 if OLD_TRITON else 0

# One of each kind: both ends of the two-pass kernels' register use, a loss in one read, the three passes with most
# registers, metrics in either, an output head of the student alone, rows with scales of their own,
# the scaling of a stored gradient, shards of rows, and what is read beside stored ids.
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
    "forward_kl T=1 ce gradient stored",
    "forward_kl T=2 ce gradient all-metrics stored",
)


def compiling(code: str, *args: str) -> object:
    """Return what `code` prints as JSON, in a process that compiles; it may use the benchmark's modules."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    start = f"import json, sys; sys.path.append({str(CHECKOUT)!r})\n"
    start += "from benchmarks import _launches as launches, binaries\n"
    command = [sys.executable, "-W", "ignore", "-c", start + code, *args]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


COMPILE = """
names = sys.argv[1:]
cases = [case for case in launches.all_cases() if not names or case.name in names]
found = binaries.reports(cases, binaries.ARCHITECTURES, jobs=2)
print(json.dumps([report.as_dict() for report in found]))
"""


def check(reports: list[dict]) -> None:
    assert sum(report["spilled_bytes"] > 0 for report in reports) <= (4 if OLD_TRITON else 0)
    for report in reports:
        assert report["spilled_bytes"] <= SPILLED, report
        assert report["narrow"] == 0, report
        assert 0 < report["registers"] <= (report["most_registers"] or 255), report
        assert report["warps_per_sm"] >= 8, report  # two per scheduler: one computes while the other waits


def test_some_binaries_spill_nothing_and_load_128_bits():
    reports = compiling(COMPILE, *SUBSET)
    assert {(r["case"], r["arch"]) for r in reports} == {(c, arch) for c in SUBSET for arch in (80, 90)}
    check(reports)


@pytest.mark.slow
@pytest.mark.nightly
def test_no_binary_spills_and_all_load_128_bits():
    reports = compiling(COMPILE)
    # 7 divergences x T x cross-entropy x gradient x metrics, and what the other cases add
    assert len(reports) >= 2 * (112 + 20 + 100)
    assert {r["kernel"] for r in reports} == set(compiling(KERNELS))
    check(reports)


# The gate: what the compiled code has to keep. The first divergences read their logits twice, the others three times.
# Issuing instructions may take so much of the time that moving the bytes takes, on an H100, at bf16.
LIMITS = {
    **dict.fromkeys(("forward_kl", "reverse_kl", "symmetric_kl"), 0.8),
    **dict.fromkeys(("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"), 1.1),
}
GATE = tuple(f"{divergence} T={temperature} ce gradient" for divergence in LIMITS for temperature in (1, 2))
QUICK = ("forward_kl T=2 ce gradient", "jsd T=2 ce gradient", "tvd T=1 ce gradient")
# Spills and width of loads at other vocabularies and dtypes than the subset's, in the cases with most registers.
MULTIPLES_OF_16, MULTIPLE_OF_8, ODD = (128256, 151936, 49152), (50280,), (50257,)
SHAPES = (
    *(("fp32", MULTIPLES_OF_16, (arch,)) for arch in (80, 90)),
    *((dtype, vocabs, (80, 90)) for vocabs in (MULTIPLE_OF_8, ODD) for dtype in ("bf16", "fp32")),
)
BY_DAY = (("fp32", MULTIPLES_OF_16, (90,)), ("bf16", ODD, (80, 90)))

gated = pytest.mark.skipif(OLD_TRITON, reason="the limits are those of the Triton that constraints.txt pins")


def held(name: str, *values: object, slow: bool, nightly: bool = False) -> object:
    """Return the parameters of one case of the gate."""
    marks = [pytest.mark.slow] * slow + [pytest.mark.nightly] * nightly
    return pytest.param(*values, id=name, marks=marks)


COMPILE_GATE = """
dtype, architectures, vocabs, names = map(json.loads, sys.argv[1:])
cases = [case for case in launches.all_cases() if case.name in names]
found = binaries.reports(cases, architectures, 2, vocabs, [dtype])
print(json.dumps([report.as_dict() for report in found]))
"""


@functools.cache
def compile_gate(names: tuple[str, ...], dtype: str, vocabs: tuple[int, ...], architectures: tuple[int, ...]) -> list:
    """Return the reports of cases, each process of the tests once."""
    return compiling(COMPILE_GATE, *map(json.dumps, (dtype, architectures, vocabs, names)))


def gate_of(case: str) -> dict:
    """Return the report of one case on an H100, compiled together with those that run in the same tests."""
    together = QUICK if case in QUICK else tuple(name for name in GATE if name not in QUICK)
    return next(report for report in compile_gate(together, "bf16", MULTIPLES_OF_16, (90,)) if report["case"] == case)


@gated
@pytest.mark.parametrize("case", [held(case, case, slow=case not in QUICK) for case in GATE])
def test_instructions_take_no_longer_than_memory(case):
    report = gate_of(case)
    limit = LIMITS[case.split()[0]]
    assert (len(report["passes"]), report["bytes"]) == ((2, 10) if limit < 1 else (3, 14))
    seconds = report["seconds"]
    assert seconds["special"] <= seconds["memory"]
    assert seconds["issue"] <= limit * seconds["memory"], f"{seconds['issue'] / seconds['memory']:.0%}"


# Shares of the bytes' time that issuing instructions and exponentials may take.
STORED = {"forward_kl T=1 ce gradient stored": (0.45, 0.4), "forward_kl T=2 ce gradient stored": (0.6, 0.8)}


@gated
@pytest.mark.parametrize("case", STORED)
def test_passes_beside_stored_ids_take_no_longer_than_memory(case):
    """One read, and one more that writes, each in a kernel of its own; both together as those of whole logits."""
    reports = [r for r in compile_gate(tuple(STORED), "bf16", MULTIPLES_OF_16, (90,)) if r["case"] == case]
    assert {r["kernel"]: r["bytes"] for r in reports} == {"rest_sums_kernel": 2, "rest_gradient_kernel": 4}
    for report in reports:
        (only,) = report["passes"]
        assert only["barriers"] == report["spilled_bytes"] == report["narrow"] == 0
    seconds = {name: sum(r["seconds"][name] for r in reports) for name in ("issue", "special", "memory")}
    issue, special = STORED[case]
    assert seconds["special"] <= special * seconds["memory"], f"{seconds['special'] / seconds['memory']:.0%}"
    assert seconds["issue"] <= issue * seconds["memory"], f"{seconds['issue'] / seconds['memory']:.0%}"


@gated
@pytest.mark.parametrize("cases", [held("barriers", QUICK, slow=False)])
def test_no_barrier_stops_a_pass(cases):
    assert not [case for case in cases if any(one["barriers"] for one in gate_of(case)["passes"])]


@gated
@pytest.mark.parametrize(
    ("dtype", "vocabs", "architectures"),
    [
        held(f"{dtype} V={vocabs[0]} {sms}", dtype, vocabs, sms, slow=True, nightly=(dtype, vocabs, sms) not in BY_DAY)
        for dtype, vocabs, sms in SHAPES
    ],
)
def test_other_vocabularies_and_dtypes_spill_nothing_and_load_128_bits(dtype, vocabs, architectures):
    names = (*(case for case in GATE if "T=2" in case), "forward_kl T=2 ce gradient all-metrics", "jsd T=2 ce loss")
    names += ("forward_kl T=2 ce gradient all-metrics stored",)
    reports = compile_gate(names, dtype, vocabs, architectures)
    assert {report["case"] for report in reports} == set(names)
    assert not [report["case"] for report in reports if report["spilled_bytes"]]
    assert all(report["passes"] for report in reports)
    if vocabs != ODD:  # whose rows start anywhere
        assert not [report["case"] for report in reports if report["narrow"]]


@gated
def test_loops_are_counted_whatever_their_shape():
    """Unrolled or not, with a tail in the loop, behind it or in one of its own: two passes, the same work for an id."""
    code = """
sys.path.append(sys.argv[1])
import tails
answer = {}
for tail in ("masked", "straight", "loop"):
    for unroll in (1, 4):
        types = (("student", "*bf16"), ("out", "*bf16"), ("n_ids", "i32"))
        constants = (("TAIL", tail), ("UNROLL", unroll), ("BLOCK", 2048))
        signature = types + tuple((name, "constexpr") for name, _ in constants)
        options = (("num_warps", 8), ("enable_fp_fusion", True))
        binary = launches.Binary("softmax_kernel", "tails", signature, constants, ("student", "out", "n_ids"), options)
        answer[f"{tail} {unroll}"] = binaries.compile_binary("softmax", binary, 90).as_dict()["passes"]
print(json.dumps(answer))
"""
    found = compiling(code, os.path.dirname(__file__))
    for name, passes in found.items():
        tail, unroll = name.split()
        assert [one["loaded_bytes"] for one in passes] == [2, 2], name
        assert [one["stored_bytes"] for one in passes] == [0, 2], name
        assert {one["unrolled"] for one in passes} == {int(unroll)}, name
        assert not any(one["barriers"] for one in passes), name
        # masks cost some; the loop's own instructions, counter and branch, are shared by more ids where it is unrolled
        for one, plain in zip(passes, found["straight 1"], strict=True):
            allowed = 1.4 if tail == "masked" else 1.02
            assert 0.7 * plain["instructions"] < one["instructions"] <= allowed * plain["instructions"], name


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
case = next(case for case in launches.all_cases() if case.name == "jsd T=2 ce gradient")
with patch.object(binaries.rows, "blocks_for", lambda *_: binaries.Blocks(4096, 4, 40)):
    tight, = binaries.reports([case], [90])
odd, = binaries.reports([case], [90], vocabs=[1025])
print(json.dumps([tight.spilled_bytes, tight.narrow, odd.narrow]))
"""
    spilled, narrow, odd = compiling(code)
    assert spilled > 0
    assert narrow == 0
    assert odd > 0  # rows of odd length start anywhere


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


def test_equal_models_are_equal_in_compiled_code():
    """No a·c - b·c as a multiply-add and a product, not 0 where a = b; no quick division, whose a/a is not 1."""
    code = """
import re
answer = {}
for name in sys.argv[1:]:
    case = next(case for case in launches.all_cases() if case.name == name)
    for binary in launches.binaries_of(case):
        ptx = binaries.compiled(binary, 90).asm["ptx"]
        factors = {m[1]: m[2] for m in re.finditer(r"mul\\.f32\\s+(%[rf]\\d+), (\\S+), \\S+;", ptx)}
        negated = {m[1]: m[2] for m in re.finditer(r"neg\\.f32\\s+(%[rf]\\d+), (%[rf]\\d+);", ptx)}
        fused = re.findall(r"fma\\.rn\\.f32\\s+%[rf]\\d+, (\\S+), \\S+, (%[rf]\\d+);", ptx)
        key = f"{name}: {binary.kernel}"
        answer[key] = sum(negated.get(addend) in factors and factors[negated[addend]] == c for c, addend in fused)
        answer[key] += len(re.findall(r"div\\.(?:full|approx)", ptx))
        assert fused or "results" in key, key
print(json.dumps(answer))
"""
    cases = (
        "forward_kl T=1 ce gradient",
        "forward_kl T=1 loss",
        "reverse_kl T=2 loss",
        "jsd T=2 gradient",
        "skew_forward_kl T=2 ce gradient",
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
from torchtune_kd.kernels._chunks import Models
from torchtune_kd.kernels._linear import NeededGradients, linear_forward
from torchtune_kd.kernels._plan import Plan
from torchtune_kd.kernels._teachers import TeacherHead
vocab, n, width = 50257, 4096, 64
tensor = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")
teacher = TeacherHead(tensor(n, width), tensor(vocab, width), None)
models = Models(tensor(n, width), tensor(vocab, width), None, teacher)
labels = torch.empty(n, dtype=torch.int64, device="meta")
answer = []
for name in ("forward_kl", "jsd"):
    plan = Plan(Objective(name, temperature=2.0, kd_ratio=0.5), (), vocab, "mean", True, True)
    with launches.recorded() as found:
        linear_forward(models, labels, plan, 2048, "triton", NeededGradients(True, False, False))
    report = binaries.compile_binary(name, found[0], 90)
    answer.append([len(set(found)), min(one.narrowest for one in report.passes), report.spilled_bytes])
print(json.dumps(answer))
"""
    for binaries, narrowest, spilled in compiling(code):
        assert (binaries, narrowest) == (1, 128)
        assert spilled <= SPILLED


def test_rows_with_gaps_compile():
    code = """
import torch
from torchtune_kd.kernels import Objective
from torchtune_kd.kernels._plan import Plan
from torchtune_kd.kernels._softmax import softmax_forward
answer = []
for vocab, dtype in ((50257, torch.float32), (7, torch.bfloat16)):
    logits = torch.empty(3, 2 * vocab, dtype=dtype, device="meta")[:, ::2]
    plan = Plan(Objective("forward_kl"), (), vocab, "mean", True, True)
    with launches.recorded() as found:
        softmax_forward(logits, logits, torch.empty(3, dtype=torch.int64, device="meta"), plan, "triton")
    answer += [binaries.compile_binary("gaps", binary, 90).spilled_bytes for binary in found]
print(json.dumps(answer))
"""
    assert compiling(code) == [0, 0]


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


def test_refuses_to_interpret():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "benchmarks.binaries", "scale"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("interprets its kernels and compiles nothing; unset it")
    assert not done.stdout


def test_the_benchmark_of_losses_finds_the_instructions_of_its_cases():
    code = """
import torch
from benchmarks.losses._case import Case
from benchmarks.losses._compiled import instructions_per_logit
torch.cuda.get_device_capability = lambda: (9, 0)
trained = Case(op="linear", trainable_head=True)
found = [instructions_per_logit(case) for case in (Case(), Case(temperature=2.0, metrics="all"), trained)]
cases = [case for case in launches.all_cases() if case.name in sys.argv[1:]]
counted = {report.case: report.instructions for report in binaries.reports(cases, [90])}
print(json.dumps([found, [counted[name] for name in sys.argv[1:]]]))
"""
    names = ("forward_kl T=1 ce gradient", "forward_kl T=2 ce gradient all-metrics")
    (plain, metrics, trained), counted = compiling(code, *names)
    assert [plain, metrics] == counted
    assert trained > 0


def test_the_command_prints_both_bounds_and_what_they_stand_for():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.binaries", "ce", "student-metrics", "gradient"]
    done = subprocess.run(command, capture_output=True, text=True, env={**env, "PYTHONPATH": str(CHECKOUT)}, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "sm_90 as H100 SXM: 132 SMs of 4 schedulers at 1.755 GHz" in done.stdout
    heads, line = (re.split("  +", found.strip()) for found in done.stdout.splitlines() if "  " in found)
    found = dict(zip(heads, line, strict=True))
    assert found["case"] == "ce gradient student-metrics"
    *_, instructions = map(float, re.findall(r"[\d.]+", found["instructions/id"]))
    # 32 threads a warp, 4 schedulers on each of 132 SMs; 1.9 ms are 6 bytes at 3.35 TB/s
    assert float(found["issue ms"]) == pytest.approx(8192 * 128256 * instructions / 32 / 4 / 132 / 1.755e6, rel=0.01)
    assert (found["bytes/id"], found["memory ms"]) == ("6", "1.88")
