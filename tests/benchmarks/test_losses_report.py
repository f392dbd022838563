"""``benchmarks.losses``: what it says of what did not run, its targets, its files and its command."""

import json
from datetime import datetime, timezone

import pytest

from helpers.checkout import benchmarks as part

cases, counts, inputs_of = part("losses._case"), part("losses._counts"), part("losses._inputs")
implementations, cells, runs = part("losses._implementations"), part("losses._cell"), part("losses._run")
report, target_lines, command = part("losses._report"), part("losses._targets"), part("losses.__main__")
Case, Cell, Result = cases.Case, cells.Cell, runs.Result

SOFTMAX = Case(tokens=32, vocab=300)
LINEAR = Case(op="linear", tokens=32, vocab=300, widths=(48, 64))


# What does not run.


def test_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(implementations.importlib.util, "find_spec", lambda name: None)
    result = runs.run_case(LINEAR, "cpu", ["liger", "fla"], 0, runs.Clock(60))
    assert result.cell("liger-chunked").missing == "not installed (pip install liger-kernel)"
    assert "fla-fused-kl: not installed (pip install flash-linear-attention)" in table(result)


def test_kernels_for_a_gpu_say_so_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cells.find("ours-triton", "softmax").missing("cpu") == "needs a GPU (Triton kernels)"


def test_failure_is_a_reason_and_not_the_end():
    def call(inputs, case):
        raise RuntimeError("no\nsuch kernel")

    one = cells.find("ours-torch", "softmax")._replace(call=call)
    cell = cells.measure_cell(one, inputs_of.make_inputs(SOFTMAX, "cpu"), None, SOFTMAX, 0)
    assert cell.missing == "failed: RuntimeError: no such kernel"


def test_no_time_left_is_said():
    result = runs.run_case(SOFTMAX, "cpu", ["ours-torch"], 0, runs.Clock(0))
    assert result.cell("ours-torch").missing == runs.LATE
    clock = runs.Clock(60)
    clock.stop("broken")
    assert runs.run_case(SOFTMAX, "cpu", ["ours-torch"], 0, clock).cell("ours-torch").missing == "broken"


def test_entries_left_out_of_a_variation_are_named():
    one = cells.find("ours-torch", "linear")  # on a GPU 30 times as slow as ours-triton
    assert "left out" in one.missing("cuda", LINEAR._replace(peers="few"))
    assert "left out" in one.missing("cuda", LINEAR._replace(peers="none"))
    assert one.missing("cuda", LINEAR) is None
    assert one.missing("cpu", LINEAR._replace(peers="few")) is None


def test_on_a_gpu_ours_are_measured_in_all_cases_before_any_peer(monkeypatch):
    asked = []

    def run_case(case, device, words, budget, clock, apart, keys, earlier):
        asked.append((case.tokens, keys))
        cells = [cell("ours-triton", 1.0)] if earlier is None else [*earlier.cells, cell("liger-kl", 2.0)]
        return Result(case, cells)

    monkeypatch.setattr(runs, "run_case", run_case)
    plan, told = [SOFTMAX, SOFTMAX._replace(tokens=64)], []
    results = runs.run_cases(plan, "cuda", None, 0.3, runs.Clock(60), told.append)
    assert asked == [(32, runs.FIRST), (64, runs.FIRST), (32, None), (64, None)]
    assert [len(result.cells) for result in told] == [1, 1, 2, 2]
    assert [[cell.key for cell in result.cells] for result in results] == [["ours-triton", "liger-kl"]] * 2
    runs.run_cases(plan, "cpu", None, 0.3, runs.Clock(60), told.append)
    assert asked[4:] == [(32, None), (64, None)]


def test_what_was_measured_earlier_is_not_measured_again(monkeypatch):
    monkeypatch.setattr(runs, "measure_cell", lambda one, *_: cell(one.key, 3.0))
    earlier = runs.run_case(SOFTMAX, "cpu", None, 0, runs.Clock(60), False, ("ours-torch",))
    assert [one.key for one in earlier.cells] == ["ours-torch"]
    monkeypatch.setattr(runs, "measure_cell", lambda one, *_: cell(one.key, 4.0))
    result = runs.run_case(SOFTMAX, "cpu", ["ours-torch", "torchtune"], 0, runs.Clock(60), False, None, earlier)
    assert {one.key: one.seconds for one in result.cells} == {
        "ours-torch": 3.0,
        "torchtune": 4.0,
        "torchtune-compile": 4.0,
    }


# Report.


RATES = counts.Rates(1e12, 1e14)


def table(result) -> str:
    return report.case_table(result, RATES)


def cell(key: str, seconds: float, extra: int = 2**20) -> Cell:
    return Cell(
        key, None, seconds, seconds, None, 9, 1.0, extra, extra, 1e-5, 2e-3, ("entropy",) if key == "torchtune" else ()
    )


# a softmax case of the main line needs 3 ms here, JSD 4.2 ms, a linear one 21 ms
GPU = counts.Rates(10 * 8192 * 128256 / 3e-3, 2 * 8192 * 128256 * 8192 / 21e-3)


def gpu_results(ours: float = 1.0) -> list[Result]:
    """A run in which every target is just reached if `ours` is below 1, and none if it is above."""
    linear = Case(op="linear")
    half = linear._replace(ignored=0.5)
    softmax = cell("ours-triton", 3e-3 / 0.85 * ours)
    return [
        Result(Case(), [softmax, cell("torchtune-compile", 18e-3)]),
        Result(Case(temperature=2.0, peers="few"), [softmax]),
        Result(
            Case(divergence="jsd", kd_ratio=1.0),
            [cell("ours-triton", 4.2e-3 / 0.8 * ours), cell("liger-jsd", 21e-3), cell("liger-jsd-bf16", 8.4e-3)],
        ),
        Result(
            linear,
            [
                cell("ours-triton", 21e-3 / 0.85 * ours),
                cell("liger-chunked-compile", 42e-3),
                cell("fla-fused-kl", 21e-3 / 0.85 * ours),
            ],
        ),
        Result(half, [cell("ours-triton", 0.6 * 21e-3 / 0.85 * ours**2)]),
        Result(half._replace(labels_on_device=True, peers="none"), [cell("ours-triton", 0.6 * 21e-3 / 0.85 * ours**2)]),
        Result(linear._replace(tokens=65536, peers="none"), [cell("ours-triton", 0.2, int(1.2e9 * ours))]),
    ]


@pytest.mark.parametrize(("ours", "verdict"), [(0.99, "met"), (1.01, "missed")])
def test_targets_on_a_gpu(ours, verdict):
    lines = target_lines.targets(gpu_results(ours), "cuda", GPU)
    promised = [line for line in lines if line.verdict != "reported"]
    assert [line.verdict for line in promised] == [verdict] * 7
    assert promised[0].wanted == ">= 85% (3.53 ms)"
    assert promised[0].measured == ("86% (3.49 ms)" if ours < 1 else "84% (3.56 ms)")


def test_no_target_asks_for_more_than_the_device_has():
    """Five times Liger's bf16 JSD was one, on a GPU where that is less than the bytes take."""
    lines = {line.text: line for line in target_lines.targets(gpu_results(), "cuda", GPU)}
    reported = [line for line in lines.values() if line.verdict == "reported"]
    assert len(reported) == 5
    bf16 = next(line for line in reported if "Liger's in bf16" in line.text)
    assert (bf16.wanted, bf16.measured) == ("at most 2.00x at the bound", "1.60x")
    for line in lines.values():
        if line.wanted.endswith("ms)"):
            assert float(line.wanted.removeprefix(">= ").split("%")[0]) <= 90


def test_targets_without_a_number_say_why():
    results = gpu_results()
    results[3] = Result(Case(op="linear"), [cell("ours-triton", 28e-3), Cell("fla-fused-kl", "not installed")])
    verdicts = [line.verdict for line in target_lines.targets(results[:4], "cuda", GPU)]
    assert "fla-fused-kl: not installed" in verdicts
    assert "liger-chunked-compile: not part of this run" in verdicts
    assert "ours-triton: largest N measured is 8192" in verdicts


def test_targets_on_a_cpu():
    results = [Result(SOFTMAX, [cell("ours-torch", 2.0), cell("torchtune", 3.0), cell("torchtune-compile", 1.0)])]
    *gpu, cpu = target_lines.targets(results, "cpu", RATES)
    assert {line.verdict for line in gpu} == {"needs a GPU"}
    assert gpu[0].wanted == ">= 85%"
    assert cpu.measured.startswith("0.50x at worst")
    assert cpu.verdict == "missed in 1 of 1"
    results[0].cells.pop()
    assert target_lines.targets(results, "cpu", RATES)[-1].verdict == "met"


def test_a_line_names_its_largest_bound():
    """On 10 GB and a million million bytes a second, and twice as long to issue 88 instructions a logit."""
    rates = counts.Rates(1e12, 1e14, instructions=88 * 8192 * 128256 / 32 / 21e-3)
    counted = cell("ours-triton", 42e-3)._replace(instructions=88.0, host_seconds=1e-3)
    text = report.case_table(Result(Case(), [counted, cell("torchtune", 84e-3)]), rates)
    assert "needs 10.5 GB and 0 TFLOP, at least 10.51 ms (memory)" in text
    heads, _, ours, peer = (
        [part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    )
    ours, peer = dict(zip(heads, ours, strict=True)), dict(zip(heads, peer, strict=True))
    assert (ours["GB"], ours["TFLOP"], ours["instr/logit"], ours["host"]) == ("10.5", "-", "88.0", "1.00 ms")
    assert (ours["bound"], ours["reached"], ours["of need"]) == ("21.00 ms instructions", "50%", "25%")
    assert (peer["bound"], peer["reached"], peer["of need"]) == ("10.51 ms memory", "13%", "13%")


def test_report_holds_everything(tmp_path):
    setting = report.Setting(
        "cpu",
        "A CPU (fast), 2 cores",
        {"torch": "2.6.0", "fla-core": "missing"},
        "python -m benchmarks.losses --quick",
        counts.Rates(1e12, 1e14),
        datetime(2026, 1, 2, 3, 4, tzinfo=timezone.utc),
    )
    results = [
        Result(SOFTMAX, [cell("ours-torch", 2.0), cell("torchtune", 3.0), Cell("liger-kl", "not installed")]),
    ]
    markdown, data = report.write(setting, results, tmp_path / "reports")
    assert markdown.name == "losses-2026-01-02-0304-a-cpu--fast.md"
    text = markdown.read_text()
    for expected in (
        "2026-01-02 03:04 UTC",
        "`python -m benchmarks.losses --quick`",
        "A CPU (fast), 2 cores",
        "torch 2.6.0, fla-core missing",
        "copy 1000 GB/s, bf16 products 100 TFLOP/s",
        "needs a GPU",
        "1.50x",
        "- liger-kl: not installed",
        f"- {report.letter('entropy')}: {implementations.LACKS['entropy']}",
    ):
        assert expected in text
    saved = json.loads(data.read_text())
    assert saved["cases"][0]["cells"][1]["seconds"] == 3.0
    assert saved["cases"][0]["work"]["bytes"] == 10 * 32 * 300
    assert saved["rates"]["copy_bytes"] == 1e12
    assert [line["verdict"] for line in saved["targets"]][-1] == "met"


def test_list_shows_cases_and_reasons(capsys):
    command.main(["--list", "--device", "cpu", "--only", "linear", "80%"])
    text = capsys.readouterr().out
    assert "linear, forward_kl + 0.5 CE, N=64, V=49152, T=1, 80% ignored" in text
    assert "softmax, forward" not in text
    assert "ours-torch (softmax, linear): runs here" in text


def test_one_cell_in_a_process_of_its_own():
    result = runs.run_case(LINEAR._replace(ignored=0.5), "cpu", ["ours-torch"], 0, runs.Clock(100))
    (cell,) = result.cells
    assert cell.missing is None
    assert cell.seconds > 0
    assert cell.gradient_error < 0.015
    assert "ours-torch" in table(result)
