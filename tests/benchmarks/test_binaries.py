"""The benchmark that counts what kernels compile to: loops, spills, occupancy and what its command prints."""

import os
import re
import subprocess
import sys

import pytest

from helpers.checkout import CHECKOUT, benchmarks
from helpers.compiling import compiling, gated, needs_triton

pytestmark = needs_triton


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
