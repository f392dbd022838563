"""``benchmarks.gpu``: its rehearsal as one types it, what its checks notice, what it says of what is late or broken."""

import json
import subprocess
import sys
import time
from datetime import datetime, timezone

import pytest
import torch

import torchtune_kd.kernels
from helpers import oracle
from helpers.checkout import CHECKOUT
from helpers.checkout import benchmarks as part

sections, runner, report_file, jobs = (part(f"gpu.{name}") for name in ("_sections", "_runner", "_report", "_job"))
kernels, more, cases, formulas = part("gpu.kernels"), part("gpu._more"), part("gpu._cases"), part("gpu._formulas")
steps, waits, counter, standins = part("gpu.steps"), part("gpu.waits"), part("gpu._counter"), part("gpu._standins")
Outcome = runner.Outcome


# ------------------------------------------------------------------------------------------------ rehearsal


@pytest.mark.slow
@pytest.mark.nightly  # a minute and a half; to be typed before a GPU is asked for
def test_the_rehearsal_finds_nothing_wrong(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--minutes", "9", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    markdown, data = sorted(tmp_path.iterdir(), reverse=True)
    assert f"wrote {markdown}" in done.stdout
    found = json.loads(data.read_text())
    assert found["rehearsal"]
    assert found["problems"] == []
    assert {name: part["state"] for name, part in found["sections"].items()} == {
        section.name: "done" for section in sections.SECTIONS
    }

    checks = found["sections"]["kernels"]["rows"]
    assert {row["of"] for row in checks} == set(kernels.PARTS)
    left_out = {row["what"] for row in checks if "left_out" in row}
    assert left_out <= {"CUDA graph", "beyond 2^31 elements", "process group of 1", "Triton"}
    for what in ("logits", "hidden states", "equal models", "in place", "3 repeats"):
        assert {row["of"] for row in checks if row["what"] == what and row["ok"]} == set(formulas.DIVERGENCES)
    assert len([row for row in checks if row["what"] == "stored ids" and row["ok"]]) == 2 * len(formulas.DIVERGENCES)

    assert len([row for row in found["sections"]["losses"]["rows"] if "case" in row]) == 2
    runs = {(row["kind"], row["side"]): row for row in found["sections"]["steps"]["rows"]}
    assert set(runs) == set(steps.RUNS)
    for row in runs.values():
        assert len(row["seconds"]) == 4
        assert len(row["losses"]) == 7
        assert len(row["waits"]) == 2
        assert row["start"] > 0
    planned = found["sections"]["plan"]["rows"]
    assert {(row["kind"], row["side"]) for row in planned} >= {("lora", "ours"), ("full", "ours")}
    (step,) = (row for row in found["sections"]["waits"]["rows"] if "recipe" in row)
    assert len(step["waits"]) == 2

    text = markdown.read_text()
    for section in sections.SECTIONS:
        assert f"## {section.module.TITLE}" in text
    assert "All checks hold." in text


# --------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("divergence", formulas.DIVERGENCES)
def test_formulas_are_the_oracle_of_the_tests(divergence):
    student, teacher, labels = torch.randn(5, 9).double(), torch.randn(5, 9).double(), torch.tensor([1, -100, 3, 0, 8])
    found = formulas.mean_objective(student, teacher, labels, divergence, 2.0, 0.3)
    right = oracle.mean(student, teacher, labels, divergence, formulas.BETA.get(divergence), 2.0, 0.3)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=0)


SMALL = cases.Case(60, 9, 2.0, 0.5, "some", (torch.float32, torch.float32))
CHECKS = {
    "logits": lambda: kernels.check_logits("jsd", SMALL, "cpu", "torch"),
    "hidden states": lambda: kernels.check_hidden("jsd", SMALL, True, "cpu", "torch"),
    "equal models": lambda: kernels.check_equal("jsd", SMALL._replace(kd_ratio=1.0), "cpu", "torch"),
    "in place": lambda: kernels.check_in_place("jsd", SMALL, "cpu", "torch"),
    "repeats": lambda: kernels.check_repeats("jsd", SMALL, 3, "cpu", "torch"),
    "labels": lambda: more.check_labels("strided", SMALL._replace(tokens=12), "cpu", "torch"),
    "metrics": lambda: more.check_metrics("jsd", SMALL, "cpu", "torch"),
    "stored ids": lambda: more.check_stored("jsd", SMALL, "cpu", "torch"),
}
WRONG = {
    "value": lambda loss, call: loss * 1.01,
    "gradient": lambda loss, call: loss * 1.01 - (loss * 0.01).detach(),
    "not a number": lambda loss, call: loss * float("nan"),
    "changing": lambda loss, call: loss * (1 + call * 1e-6),
}
# what each way of being wrong is noticed by; a wrong factor leaves 0 and equal bits as they are
NOTICED = {
    "value": ["logits", "hidden states", "in place"],
    "gradient": ["logits", "hidden states", "in place"],
    "not a number": ["logits", "hidden states", "equal models", "in place", "repeats", "labels", "stored ids"],
    "changing": ["repeats", "labels"],
}


@pytest.mark.parametrize("check", CHECKS)
def test_checks_hold(check):
    assert CHECKS[check]() <= 1


@pytest.mark.parametrize(("wrong", "check"), [(wrong, check) for wrong in NOTICED for check in NOTICED[wrong]])
def test_checks_notice_what_is_wrong(wrong, check, monkeypatch):
    right, calls = torchtune_kd.kernels.softmax_kd_loss, []
    linear, sparse = torchtune_kd.kernels.linear_kd_loss, torchtune_kd.kernels.linear_sparse_kd_loss

    def changed(function):
        def call(*args, **kwargs):
            calls.append(1)
            return WRONG[wrong](function(*args, **kwargs), len(calls))

        return call

    monkeypatch.setattr(torchtune_kd.kernels, "softmax_kd_loss", changed(right))
    monkeypatch.setattr(torchtune_kd.kernels, "linear_sparse_kd_loss", changed(sparse))
    if check != "in place":  # which compares the two
        monkeypatch.setattr(torchtune_kd.kernels, "linear_kd_loss", changed(linear))
    assert CHECKS[check]() > 1


def test_a_wrong_metric_is_noticed(monkeypatch):
    right = torchtune_kd.kernels.softmax_kd_loss

    def changed(*args, **kwargs):
        loss, sums = right(*args, **kwargs)
        return loss, sums | {"kl": sums["kl"] * 1.001}

    monkeypatch.setattr(torchtune_kd.kernels, "softmax_kd_loss", changed)
    assert CHECKS["metrics"]() > 1


def test_an_interpreter_that_fails_is_named(monkeypatch):
    def fail(*args, **kwargs):
        raise TypeError("only 0-dimensional arrays")

    monkeypatch.setattr(torchtune_kd.kernels, "softmax_kd_loss", fail)
    job = jobs.Job("kernels", "jsd", "cpu", True, 9.0, "", {})
    backend, why = kernels.backend_of(job)
    assert backend == "torch"
    assert "TypeError: only 0-dimensional arrays" in why


def test_unwritten_memory_is_not_a_number():
    code = (
        "import torch\nfrom benchmarks.gpu.kernels import poison_unwritten_memory\npoison_unwritten_memory()\n"
        "assert torch.empty(1000).isnan().all() and torch.zeros(3).new_empty(5).isnan().all()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True, timeout=120)


def test_waits_are_counted_where_they_stand():
    found = counter.WaitCounter("cpu")
    found.start()
    value = torch.ones(3).sum().item()
    again = torch.tensor([0.0, value]).nonzero()
    places = found.stop()
    assert len(again) == 1
    assert sum(places.values()) == 2
    assert all(place.startswith("tests/benchmarks/test_gpu.py:") for place in places)


def test_a_step_clock_leaves_the_first_step_out(tmp_path):
    clock = standins.StepClock(str(tmp_path / "steps.json"), "cpu", timed=2, counted=1, ends_run=True)
    for step in range(3):
        clock.log_dict({"loss": float(step), "peak_memory_alloc": 2.0}, step)
        torch.ones(1).item()
    with pytest.raises(SystemExit):
        clock.log_dict({"loss": 3.0}, 3)
    found = json.loads((tmp_path / "steps.json").read_text())
    assert len(found["seconds"]) == 2
    assert found["losses"] == [0, 1, 2, 3]
    assert found["peaks"] == [2 * 2**30] * 2
    assert [sum(places.values()) for places in found["waits"]] == [1]


# --------------------------------------------------------------------------------------------- time, report


def names(groups):
    return [[section.name for section in group] for group in groups]


def test_sections_come_in_their_order_with_what_they_need():
    assert names(sections.groups(None)) == [["machine"], ["plan", "waits", "kernels"], ["steps"], ["losses"]]
    assert names(sections.groups(["waits", "steps"])) == [["machine"], ["plan", "waits"], ["steps"]]
    assert len(sections.groups(None, together=True)) == 2
    assert round(sections.MINUTES, 6) == 8
    # on the first GPU a run of the steps took 50 s, and three belong to them
    assert 60 * sections.find("steps").minutes > 3 * 55


@pytest.mark.parametrize(("arguments", "seconds"), [([], 150), (["--minutes", "4"], 240 * 2.5 / 3.3)])
def test_few_sections_share_the_time_that_is_asked_for(arguments, seconds, monkeypatch, tmp_path):
    ends = {}

    def run_group(group, *, end, **_):
        ends[group[0].name] = end - time.monotonic()
        return {section.name: Outcome("done", "", 0.0, []) for section in group}

    command = part("gpu.__main__")
    monkeypatch.setattr(command, "run_group", run_group)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    command.main(["--sections", "losses", "--output", str(tmp_path), *arguments])
    assert list(ends) == ["machine", "losses"]
    assert ends["losses"] - ends["machine"] == pytest.approx(seconds, abs=1)


def test_a_run_of_which_too_little_time_is_left_is_not_started(monkeypatch, tmp_path):
    took = iter((40.0, 30.0))
    times = [0.0]
    monkeypatch.setattr(steps, "check_torchtune", lambda: None)
    monkeypatch.setattr(steps, "Clock", lambda seconds: type("Clock", (), {"left": lambda self: seconds - times[0]})())

    def measured(recipe, cfg, folder, timeout):
        times[0] += next(took)
        return {"seconds": [1.0]}

    monkeypatch.setattr(steps, "measured_steps", measured)
    for name in ("our_config", "stock_config"):
        monkeypatch.setattr(steps, name, lambda *_: {})
    found = []
    steps.run(jobs.Job("steps", "", "cpu", True, 100.0, str(tmp_path), {}), found.append)
    assert [row.get("left_out") for row in found] == [None, None, "30 s were left, and the one before took 40 s"]


def run_machine(tmp_path, device, seconds):
    seen = []
    outcomes = runner.run_group(
        [sections.find("machine")],
        device=device,
        rehearse=True,
        end=time.monotonic() + seconds,
        folder=tmp_path,
        facts={},
        parallel=1,
        progress=seen.append,
    )
    return outcomes["machine"], seen


def test_what_takes_too_long_is_ended(tmp_path):
    outcome, seen = run_machine(tmp_path, "cpu", 0.3)
    assert (outcome.state, outcome.why) == ("cut", "ended when its time was up")
    assert len(seen) == 1
    outcome, _ = run_machine(tmp_path / "late", "cpu", -1)
    assert (outcome.state, outcome.why) == ("cut", "not started, the time was up")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA works here")
def test_what_fails_says_why(tmp_path):
    outcome, _ = run_machine(tmp_path, "cuda", 120)
    assert outcome.state == "failed"
    assert outcome.why.split(":")[0] in ("AssertionError", "RuntimeError")


def row(ok, share, what="logits", of="jsd"):
    return {"what": what, "of": of, "case": "a case", "ok": ok, "share": share}


def test_the_report_is_whole_after_each_section(tmp_path):
    started = datetime(2026, 1, 2, 3, 4, tzinfo=timezone.utc)
    report = report_file.Report(tmp_path, "python -m benchmarks.gpu", started, False, ["machine", "kernels", "steps"])
    machine = [{"device": "A GPU, 3 SMs", "name": "NVIDIA H100 80GB", "versions": {"torch": "9"}}]
    report.update({"machine": Outcome("done", "", 3.0, machine)})
    markdown, data = report.files
    assert markdown.name == "gpu-2026-01-02-0304-nvidia-h100-80gb.md"
    assert "to come" in markdown.read_text()
    rows = [row(True, 0.5), row(False, 2.5), row(False, 0.0, of="more") | {"error": "RuntimeError: no"}]
    report.update({"kernels": Outcome("done", "", 5.0, rows), "steps": Outcome("skipped", "no torchtune", 1.0, [])})
    text, saved = markdown.read_text(), json.loads(data.read_text())
    assert "1/2 2.50" in text
    assert "Skipped: no torchtune." in text
    assert saved["problems"] == [
        "kernels: jsd, logits: a case: 2.5 of what is allowed",
        "kernels: more, logits: a case: RuntimeError: no",
    ]
    assert sorted(tmp_path.iterdir()) == sorted(report.files)


def test_a_table_that_fails_leaves_the_report_standing(tmp_path):
    report = report_file.Report(tmp_path, "c", datetime.now(timezone.utc), True, ["steps"])
    report.update({"steps": Outcome("cut", "ended when its time was up", 5.0, [{"kind": "lora", "side": "ours"}])})
    assert "The rows cannot be shown (KeyError" in report.files[0].read_text()
    assert json.loads(report.files[1].read_text())["sections"]["steps"]["rows"]


def test_steps_stand_beside_their_plan():
    planned = [
        {"kind": "lora", "side": "ours", "bytes": 22 * 2**30, "seconds": {"H100": 0.9, "H200": 0.8}},
        {"kind": "lora", "side": "stock", "bytes": None, "seconds": {"H100": 1.9}},
    ]
    run = {"kind": "lora", "side": "ours", "tokens": 1000, "seconds": [0.5, 0.4, 0.6], "peaks": [2**34, 2**30]}
    run["start"] = 41.3
    rows = [
        run | {"waits": [{"a.py:3": 2}]},
        {"kind": "lora", "side": "stock", "tokens": 1000, "error": "out of memory"},
    ]
    text = steps.render(rows, {"name": "NVIDIA H100 80GB HBM3", "plan": planned})
    cells = next(line for line in text.splitlines() if "torchtune-kd" in line).replace(" ", "").split("|")
    assert cells[1:-1] == ["lora,torchtune-kd", "0.500s", "0.900s", "2,000", "16", "22", "2", "41s"]
    assert "- lora, stock recipe: out of memory" in text
    assert steps.problems(rows) == []


def test_more_waits_than_promised_are_a_problem_on_a_gpu():
    one = {"loss": "softmax_kd_loss", "expected": 0, "places": {"a.py:3": 1}, "runtime": 1}
    assert waits.problems([one]) == ["softmax_kd_loss: 1 waits, 0 expected"]
    assert waits.problems([one | {"runtime": None}]) == []
    assert "a.py:3" in waits.render([one, {"recipe": "ours", "waits": [{"b.py:4": 2}]}], {"name": "a GPU"})


def test_without_a_gpu_the_command_says_so():
    if torch.cuda.is_available():
        pytest.skip("CUDA works here")
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "PyTorch sees none; --rehearse runs the same code on the CPU" in done.stderr
