"""The Triton kernels as GPUs get them: compiled here for GPUs that are not, by the launches of the package itself.

Everything runs in processes that do not interpret the kernels. Legend: N tokens, V vocabulary.
"""

import functools
import json

import pytest

from helpers.compiling import KERNELS, OLD_TRITON, compiling, gated, needs_triton

pytestmark = needs_triton

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
