"""The same tokens on any number of processes: real processes, gloo."""

import pytest
from safetensors.torch import load_file

from helpers.forked import ForkedRun
from helpers.tiny import ROWS, make_config, read_log, run_in_process, run_tune

RECIPE = "torchtune_kd/kd_distributed"
NAMES = ("loss", "class_loss", "kd_loss", "kl", "grad_norm", "top1_agreement", "acceptance_rate", "lr")


def assert_same_steps(actual, expected, rel):
    assert [step["step"] for step in actual] == [step["step"] for step in expected]
    for step, other in zip(actual, expected, strict=True):
        for name in NAMES:
            assert step[name] == pytest.approx(other[name], rel=rel), (step["step"], name)


# 25 rows: the last one has no partner. Every second row is one character, so with batch 2 the first process holds
# two rows without a valid token while the other holds two long ones.
UNEVEN = [row for long in ROWS[1:14] for row in ("a", long)][:25]


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("lora", "dora", "qlora", "qdora")]


@pytest.mark.parametrize("kind", ["full", *SLOW])
def test_two_processes_give_the_numbers_of_one(tmp_path, kind):
    """2 processes x batch 2 against one x batch 4."""
    rows = UNEVEN if kind == "full" else ROWS
    common = {
        "max_steps_per_epoch": 5,
        "clip_grad_norm": 1.0,
        "run_val_every_n_steps": 5,
        "rows": rows,
    }
    one = make_config(tmp_path, kind, output_dir=str(tmp_path / "one"), batch_size=4, **common)
    two = make_config(tmp_path, kind, output_dir=str(tmp_path / "two"), batch_size=2, **common)
    for cfg in (one, two):
        cfg.dataset_val = cfg.dataset
    run_in_process(one)
    ForkedRun(two, 2).finish()
    logs = [read_log(cfg.output_dir) for cfg in (one, two)]
    training = [[step for step in log if "loss" in step] for log in logs]
    assert len(training[0]) == 5
    assert_same_steps(training[1], training[0], rel=1e-4)
    validation = [[step["val_kl"] for step in log if "val_kl" in step] for log in logs]
    assert validation[1] == pytest.approx(validation[0], rel=1e-4)
    merged = [load_file(next((tmp_path / name / "epoch_0").glob("model-*.safetensors"))) for name in ("one", "two")]
    assert merged[0].keys() == merged[1].keys()
    for name, weight in merged[0].items():
        assert merged[1][name].sub(weight).abs().max() <= 1e-4, name


@pytest.mark.slow
def test_accumulation_checkpointing_and_gathered_layers_change_no_number_either(tmp_path):
    one = make_config(tmp_path, output_dir=str(tmp_path / "one"), batch_size=4, max_steps_per_epoch=5)
    two = make_config(
        tmp_path,
        output_dir=str(tmp_path / "two"),
        batch_size=1,
        gradient_accumulation_steps=2,
        max_steps_per_epoch=5,
        enable_activation_checkpointing=True,
        fsdp_reshard_after_forward=False,
        custom_sharded_layers=["norm"],
    )
    run_in_process(one)
    ForkedRun(two, 2).finish()
    assert_same_steps(read_log(two.output_dir), read_log(one.output_dir), rel=1e-4)


@pytest.mark.slow
def test_one_process_and_accumulation_give_the_numbers_of_the_single_device_recipe(tmp_path):
    single = make_config(tmp_path, output_dir=str(tmp_path / "single"), batch_size=4, max_steps_per_epoch=5)
    one = make_config(
        tmp_path,
        output_dir=str(tmp_path / "one"),
        batch_size=2,
        gradient_accumulation_steps=2,
        max_steps_per_epoch=5,
    )
    run_in_process(single)
    run_tune(one, RECIPE, nproc=1)
    assert_same_steps(read_log(one.output_dir), read_log(single.output_dir), rel=1e-4)


@pytest.mark.slow
def test_started_without_a_launcher_says_so(tmp_path):
    result = run_tune(make_config(tmp_path), RECIPE, check=False)
    assert result.returncode == 2
    assert "--nproc_per_node" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
