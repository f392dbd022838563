"""``torchtune_kd/plan`` as a command: its page, its JSON, its sentences."""

import json
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helpers.measured import sized_config
from torchtune_kd.plan import as_dict, as_text, plan_run, read_request
from torchtune_kd.training import UserError

CHECKOUT = Path(__file__).resolve().parents[2]
LLAMA = CHECKOUT / "configs" / "llama3_2"


@pytest.fixture
def config(tmp_path):
    cfg = sized_config(tmp_path, 1, "lora")
    cfg.device = "cuda"
    return cfg


def run(monkeypatch, capsys, cfg, path, *arguments):
    """The recipe's file as a program, in this process; returns its exit code, stdout and stderr."""
    OmegaConf.save(cfg, path)
    monkeypatch.setattr(sys, "argv", ["plan.py", "--config", str(path), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(CHECKOUT / "recipes" / "plan.py"), run_name="__main__")
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


@pytest.mark.parametrize("flag", ["--json", "json=True"])
def test_json_is_all_that_is_printed_and_adds_up(monkeypatch, capsys, tmp_path, config, flag):
    arguments = ("devices=4", "gpu=H100", "sequence_length=64", flag)
    code, out, _ = run(monkeypatch, capsys, config, tmp_path / "c.yaml", *arguments)
    assert code == 0
    plan = json.loads(out)
    assert (plan["processes"], plan["shards"], plan["replicas"]) == (4, 4, 1)
    assert plan["tokens_per_step"] == 4 * 2 * 4 * 64
    assert plan["parameters"]["trained"] == plan["parameters"]["adapters"] > 0
    assert plan["device_memory"] == 80 * 2**30
    recipe = plan["torchtune_kd"]
    memory = recipe["memory"]
    assert memory["total"] == sum(memory["at_peak"].values()) == memory["phases"][memory["peak_phase"]]
    assert recipe["fits"] and recipe["largest_batch_size"] > 1000
    assert set(recipe["flops_per_step"]) == {"teacher", "student", "loss", "backward"}
    assert recipe["communication_per_step"]["gradients"] > 0
    assert recipe["seconds_per_step"]["H100"]["total"] > 0
    assert any("60%" in said for said in plan["assumptions"])


def test_page_says_what_a_reader_wants_to_know(config):
    config.merge_with({"device_memory": "20GiB", "data_parallel_replicate_dim": 2, "devices": 4})
    page = as_text(plan_run(*read_request(config)))
    for part in (
        "4 devices, weights sharded over 2 and copied 2 times; bf16; 4 x 128 tokens a microbatch, 2 a step",
        "4,096 tokens a step in all",
        "in adapters)",
        "  of which adapters",
        "gathered and in transit (FSDP2)",
        "highest point of a step",
        "in 20.0 GiB of device memory: fits, at most batch_size=",
        "TFLOP per step and device",
        "gradients, between copies",
        "RTX4090 (165.2 TFLOP/s, 1008 GB/s)",
        "NVIDIA L40S datasheet",
        "Assumed:",
    ):
        assert part in page
    assert max(map(len, page.splitlines())) <= 200


def test_a_head_in_8_bits_is_said_to_be_faster(config):
    plain = plan_run(*read_request(config))
    config.teacher_head = "float8"
    plan = plan_run(*read_request(config))
    assert plan.parameters == plain.parameters
    assert plan.memory.teacher < plain.memory.teacher
    (said,) = (line for line in as_text(plan).splitlines() if "8-bit" in line)
    assert said.startswith("- the product of the teacher's head in 8-bit floats takes 0.6 of the time of one in bf16")
    assert said.endswith("; A100 emulates it in fp32")
    assert "8-bit" not in as_text(plain)


def test_what_does_not_fit_is_said(config):
    config.device_memory = "1050MiB"
    plan = plan_run(*read_request(config))
    assert plan.largest_batch == 0
    assert "of device memory: does not fit, at most batch_size=0" in as_text(plan)


def test_largest_batch_fits_and_the_next_does_not(config):
    config.device_memory = "1250MiB"
    most = plan_run(*read_request(config)).largest_batch
    assert 4 < most < 1000
    usable = 1250 * 2**20 * 0.9 - 2**30
    totals = []
    del config.device_memory
    for size in (most, most + 1):
        config.batch_size = size
        totals.append(plan_run(*read_request(config)).memory.total)
    assert totals[0] <= usable < totals[1]


def test_a_cpu_run_has_times_where_figures_are_given(config):
    config.device = "cpu"
    assert plan_run(*read_request(config)).devices == ()
    config.merge_with({"tflops": 0.5, "bandwidth": 20})
    plan = plan_run(*read_request(config))
    assert plan.times["given"].total > plan.flops["teacher"] / 0.5e12
    assert "given (0.5 TFLOP/s, 20 GB/s)" in as_text(plan)


@pytest.mark.parametrize("key", ["fsdp_cpu_offload", "enable_activation_offloading"])
def test_no_time_is_expected_of_a_run_that_offloads(config, key):
    config.merge_with({"devices": 2, "gpu": "H100"})
    assert "seconds per step" in as_text(plan_run(*read_request(config)))
    config.merge_with({key: True, "enable_activation_checkpointing": True})
    plan = plan_run(*read_request(config))
    page = as_text(plan)
    assert f"The expected time of a step is left out: with `{key}` a step also waits for copies" in page
    assert "seconds per step" not in page and "roofline" not in page and "an operation reaches" not in page
    values = as_dict(plan)
    assert values["torchtune_kd"]["seconds_per_step"] is None
    assert values["why_no_times"] == plan.why_no_times and values["device_memory"] == 80 * 2**30


def test_without_a_teacher_it_takes_nothing(config):
    config.kd_ratio = 0.0
    plan = plan_run(*read_request(config))
    assert plan.parameters.teacher == 0 and plan.memory.teacher == 0


def test_unknown_optimizer_leaves_the_total_open(config):
    config.merge_with({"device_memory": "8GiB"})
    config.optimizer._component_ = "torch.optim.Adafactor"
    page = as_text(plan_run(*read_request(config)))
    assert "of device memory: unknown, since this optimizer's state is" in page and "unknown" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": "H1000"}, r"Expected `gpu` to be one of A100.*got H1000: did you mean H100"),
        ({"device_memory": "lots"}, r"Expected `device_memory` to be a size such as 80GiB or 24GB, got lots"),
        ({"devices": 0}, r"Expected `devices` to be above 0, got 0"),
        ({"devices": "two"}, r"Expected `devices` to be int or null, got 'two'"),
        ({"tflops": 3}, r"`tflops` .* and `bandwidth` .* together"),
        ({"devices": 2, "tflops": 3, "bandwidth": 5}, r"Expected `link_bandwidth`"),
        ({"sequence_length": 4096}, r"Expected sequences of at most 128 tokens.*got 4096: lower `sequence_length`"),
        ({"devices": 3, "data_parallel_replicate_dim": 2}, r"to be the number of (devices|processes), 3"),
        ({"device_memroy": "80GiB"}, r"Unknown key `device_memroy` in the config: did you mean `device_memory`"),
        ({"batchsize": 3}, r"Unknown key `batchsize` in the config: did you mean `batch_size`"),
        ({"kd_loss": None}, r"this one has no `kd_loss`: it is another recipe's"),
        ({"loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}}, r"Expected `kd_loss` alone"),
        ({"model": {"_component_": "torchtune.models.clip.clip_vision_encoder"}}, r"`model"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_sentence(config, change, message):
    with pytest.raises(UserError, match=message) as caught:
        plan_run(*read_request(OmegaConf.merge(config, change)))
    assert "\n" not in str(caught.value)


def test_a_mistake_ends_with_code_2_and_nothing_on_stdout(monkeypatch, capsys, tmp_path, config):
    code, out, err = run(monkeypatch, capsys, config, tmp_path / "c.yaml", "gpu=abacus", "--json")
    assert (code, out) == (2, "") and err.startswith("error: Expected `gpu` to be one of")


@pytest.mark.slow
def test_the_command_of_the_page_prints_what_stands_there(tmp_path):
    """By the real ``tune run``, by name, in a folder of nobody's, with neither weights nor GPU."""
    readme = (CHECKOUT / "docs" / "plan.md").read_text()
    block = re.search(
        r"^    (tune run torchtune_kd/plan .*)\n\n((?:(?:    .*)?\n)+?)    \[\.\.\.\]\n", readme, re.MULTILINE
    )
    command, sample = block.group(1), textwrap.dedent(block.group(2))
    words = [str(Path(sys.executable).parent / "tune"), *shlex.split(command)[1:]]
    result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "highest point of a step" in sample and "at most batch_size=" in sample
    assert result.stdout[: len(sample)] == sample
