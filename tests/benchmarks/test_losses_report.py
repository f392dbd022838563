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
    one = cells.find("ours-torch", "linear")._replace(slow=True)
    assert "left out" in one.missing("cuda", LINEAR._replace(peers="few"))
    assert one.missing("cuda", LINEAR) is None
    assert one.missing("cpu", LINEAR._replace(peers="few")) is None


# Report.


def table(result) -> str:
    return report.case_table(result, counts.Rates(1e12, 1e14))


def cell(key: str, seconds: float, extra: int = 2**20) -> Cell:
    return Cell(
        key, None, seconds, seconds, None, 9, 1.0, extra, extra, 1e-5, 2e-3, ("entropy",) if key == "torchtune" else ()
    )


def gpu_results(ours: float = 1.0) -> list[Result]:
    """A run in which every figure is just reached if `ours` is below 1, and none if it is above."""
    linear = Case(op="linear")
    half = linear._replace(ignored=0.5)
    return [
        Result(Case(), [cell("ours-triton", 3.7e-3 * ours), cell("torchtune-compile", 18.5e-3)]),
        Result(
            Case(divergence="jsd", kd_ratio=1.0),
            [cell("ours-triton", 4e-3 * ours), cell("liger-jsd", 20e-3), cell("liger-jsd-bf16", 20e-3)],
        ),
        Result(
            linear,
            [
                cell("ours-triton", 28e-3 * ours),
                cell("liger-chunked-compile", 56e-3),
                cell("fla-fused-kl", 56e-3),
            ],
        ),
        Result(half, [cell("ours-triton", 16.8e-3 * ours**2)]),
        Result(half._replace(labels_on_device=True, peers="few"), [cell("ours-triton", 16.8e-3 * ours**2)]),
        Result(linear._replace(tokens=65536, peers="none"), [cell("ours-triton", 0.2, int(1.2e9 * ours))]),
    ]


@pytest.mark.parametrize(("ours", "verdict"), [(0.99, "met"), (1.01, "missed")])
def test_targets_on_a_gpu(ours, verdict):
    lines = target_lines.targets(gpu_results(ours), "cuda")
    assert len(lines) == 10
    assert {line.verdict for line in lines} == {verdict}


def test_targets_without_a_number_say_why():
    results = gpu_results()
    results[2] = Result(Case(op="linear"), [cell("ours-triton", 28e-3), Cell("fla-fused-kl", "not installed")])
    verdicts = [line.verdict for line in target_lines.targets(results[:3], "cuda")]
    assert "fla-fused-kl: not installed" in verdicts
    assert "liger-chunked-compile: not part of this run" in verdicts
    assert "ours-triton: largest N measured is 8192" in verdicts


def test_targets_on_a_cpu():
    results = [Result(SOFTMAX, [cell("ours-torch", 2.0), cell("torchtune", 3.0), cell("torchtune-compile", 1.0)])]
    *gpu, cpu = target_lines.targets(results, "cpu")
    assert {line.verdict for line in gpu} == {"not yet measured on a GPU"}
    assert cpu.measured.startswith("0.50x at worst")
    assert cpu.verdict == "missed in 1 of 1"
    results[0].cells.pop()
    assert target_lines.targets(results, "cpu")[-1].verdict == "met"


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
        "not yet measured on a GPU",
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
