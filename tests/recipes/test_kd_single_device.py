"""The recipe on real files: what trains, what it writes, and what its numbers must equal."""

import json
import math
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torchtune import config, training
from torchtune.models.convert_weights import hf_to_tune

from helpers.resumable import CLOCK
from helpers.tiny import (
    LORA,
    ROWS,
    STUDENT,
    VOCAB,
    checkpointer_section,
    dataset_section,
    make_config,
    model_section,
    read_log,
    run_in_process,
    write_checkpoint,
    write_rows,
)
from torchtune_kd.teachers.base import NoTeacher


def losses(output_dir) -> list[float]:
    return [step["loss"] for step in read_log(output_dir) if "loss" in step]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["full", "lora", "dora", "qlora", "qdora"])
def test_every_kind_of_student_learns_and_its_checkpoint_is_its_weights(tmp_path, kind, dtype):
    cfg = make_config(tmp_path, kind, dtype=dtype, epochs=4, optimizer__lr=5e-3, kd_ratio=1.0)
    run = run_in_process(cfg)

    values = losses(cfg.output_dir)
    assert values[-1] < 0.9 * values[0]

    folder = tmp_path / "out" / "epoch_3"
    checkpointer = training.FullModelHFCheckpointer(
        checkpoint_dir=folder,
        checkpoint_files=[path.name for path in folder.glob("model-*.safetensors")],
        output_dir=tmp_path / "again",
        model_type="LLAMA3_2",
    )
    with training.set_default_dtype(training.get_dtype(dtype, torch.device("cpu"))):
        merged = config.instantiate(OmegaConf.create(model_section("full", STUDENT)))
    merged.load_state_dict(checkpointer.load_checkpoint()[training.MODEL_KEY])
    tokens = torch.arange(3, 35).unsqueeze(0)
    run.student.decoder.eval()
    with torch.no_grad():
        ours = run.student.decoder.output(run.student.decoder(tokens)).float()
        saved = merged(tokens)
    # merging rounds W + BA once more, the adapter's own path does not
    tolerance = {"fp32": 1e-4, "bf16": 0.02}[dtype] * ours.abs().max()
    torch.testing.assert_close(saved, ours, rtol=0, atol=tolerance.item())

    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert not {name for name in names if name.startswith("adapter_")}  # transformers would apply it once more
    if kind == "full":
        assert "adapter" not in names
    else:
        peft = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert peft["r"] == LORA["lora_rank"] and peft["lora_alpha"] == LORA["lora_alpha"]
        assert set(peft["target_modules"]) == {"q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert adapter["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 256)


@pytest.mark.parametrize("kind", ["full", "lora", "dora", "qlora"])
def test_checkpoint_has_the_keys_and_shapes_of_a_hugging_face_llama(tmp_path, kind):
    run_in_process(make_config(tmp_path, kind))
    before = load_file(tmp_path / "student" / "model.safetensors")
    (shard,) = (tmp_path / "out" / "epoch_0").glob("model-*.safetensors")
    after = load_file(shard)
    assert {name: weight.shape for name, weight in after.items()} == {n: w.shape for n, w in before.items()}
    assert "lm_head.weight" not in after  # tied
    assert hf_to_tune(after, 4, 2, 256).keys() == hf_to_tune(before, 4, 2, 256).keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {name for name in before if any(part in name for part in ("q_proj", "v_proj", "mlp"))}
    quantised = {name for name in before if "_proj" in name}
    assert changed == {"full": set(before), "lora": adapted, "dora": adapted, "qlora": quantised}[kind]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_microbatches_do_not_change_the_gradient(tmp_path, kind):
    """4x1, 2x2 and 1x4: unequal numbers of valid tokens, and rows with none at all (ROWS[0] is one character)."""
    logs = {}
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        cfg = make_config(
            tmp_path,
            kind,
            output_dir=str(tmp_path / f"out{batch_size}"),
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps_per_epoch=5,
        )
        run_in_process(cfg)
        logs[batch_size] = read_log(cfg.output_dir)
    assert len(logs[4]) == 5
    for other in (logs[2], logs[1]):
        for step, expected in zip(other, logs[4], strict=True):
            for name in (
                "loss",
                "class_loss",
                "kd_loss",
                "kl",
                "grad_norm",
                "top1_agreement",
                "acceptance_rate",
            ):
                assert step[name] == pytest.approx(expected[name], rel=1e-4), (step["step"], name)


def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(tmp_path):
    cfg = make_config(tmp_path, "lora", kd_ratio=1.0, max_steps_per_epoch=1)
    cfg.teacher_model = model_section("full", STUDENT)
    cfg.teacher_checkpointer = checkpointer_section(tmp_path / "student")
    run_in_process(cfg)
    (step,) = read_log(cfg.output_dir)
    assert 0 <= step["loss"] <= 1e-6
    assert step["grad_norm"] <= 1e-6
    assert step["kl"] <= 1e-6 and step["top1_agreement"] == 1
    assert step["acceptance_rate"] == pytest.approx(1, abs=1e-5)


def test_kd_ratio_0_needs_no_teacher(tmp_path):
    cfg = make_config(tmp_path, kd_ratio=0.0, max_steps_per_epoch=2)
    del cfg["teacher_model"], cfg["teacher_checkpointer"]
    run = run_in_process(cfg)
    assert isinstance(run.teacher, NoTeacher)
    step = read_log(cfg.output_dir)[0]
    assert step["loss"] == pytest.approx(step["class_loss"])
    assert "kl" not in step


def test_kd_ratio_1_computes_no_cross_entropy(tmp_path):
    cfg = make_config(tmp_path, kd_ratio=1.0, max_steps_per_epoch=1)
    run_in_process(cfg)
    (step,) = read_log(cfg.output_dir)
    assert "class_loss" not in step
    assert step["loss"] == pytest.approx(step["kd_loss"])


def test_left_over_microbatches_are_a_shorter_step(tmp_path):
    """24 rows, batch 4, accumulation 4: steps of 16 and 8 rows in each epoch, nothing carried over."""
    cfg = make_config(tmp_path, gradient_accumulation_steps=4, epochs=2, optimizer__lr=0.0)
    run = run_in_process(cfg)
    steps = read_log(cfg.output_dir)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    # at learning rate 0 the same rows give the same step: nothing leaked from one epoch into the next
    for name in ("loss", "grad_norm", "kl"):
        assert steps[2][name] == pytest.approx(steps[0][name], rel=1e-5)
        assert steps[3][name] == pytest.approx(steps[1][name], rel=1e-5)
    assert run.global_step == 4


def test_a_step_without_a_single_valid_token_changes_nothing(tmp_path):
    cfg = make_config(tmp_path, rows=["a", "b", "c", "d"], optimizer__weight_decay=0.0)
    run_in_process(cfg)
    (step,) = read_log(cfg.output_dir)
    assert step["loss"] == 0 and step["grad_norm"] == 0
    before = load_file(tmp_path / "student" / "model.safetensors")
    (shard,) = (tmp_path / "out" / "epoch_0").glob("model-*.safetensors")
    for name, weight in load_file(shard).items():
        assert torch.equal(weight, before[name]), name


def test_clip_grad_norm_bounds_the_step(tmp_path):
    """With plain SGD the step is the clipped gradient times the learning rate."""
    cfg = make_config(tmp_path, clip_grad_norm=0.01, max_steps_per_epoch=1, optimizer__lr=1.0)
    cfg.optimizer._component_ = "torch.optim.SGD"
    run_in_process(cfg)
    before = load_file(tmp_path / "student" / "model.safetensors")
    (shard,) = (tmp_path / "out" / "epoch_0").glob("model-*.safetensors")
    moved = math.sqrt(sum((w - before[n]).square().sum().item() for n, w in load_file(shard).items()))
    assert read_log(cfg.output_dir)[0]["grad_norm"] > 0.01
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_activation_checkpointing_gives_the_same_numbers(tmp_path):
    logs = []
    for flag in (False, True):
        cfg = make_config(
            tmp_path,
            output_dir=str(tmp_path / f"out{flag}"),
            enable_activation_checkpointing=flag,
            max_steps_per_epoch=3,
        )
        run_in_process(cfg)
        logs.append([{k: v for k, v in s.items() if k not in CLOCK} for s in read_log(cfg.output_dir)])
    assert logs[0] == logs[1]


def test_packed_data_predicts_across_no_document_border(tmp_path):
    """Packed or one document a row: the same tokens are predicted from the same context."""
    values = {}
    for packed in (False, True):
        cfg = make_config(tmp_path, output_dir=str(tmp_path / f"out{packed}"), batch_size=24, max_steps_per_epoch=1)
        cfg.dataset = dataset_section(tmp_path / "rows.jsonl", packed=packed)
        if packed:
            cfg.dataset.split_across_pack = False
        run_in_process(cfg)
        values[packed] = read_log(cfg.output_dir)[0]
    for name in ("loss", "class_loss", "kd_loss", "kl", "grad_norm"):
        assert values[True][name] == pytest.approx(values[False][name], rel=1e-4), name


def test_validation_runs_before_during_and_after_training(tmp_path):
    cfg = make_config(tmp_path, run_val_every_n_steps=4, max_val_batches=2, batch_size_val=3)
    cfg.dataset_val = dataset_section(write_rows(tmp_path / "val.jsonl", ROWS[5:15]))
    run_in_process(cfg)
    validations = {step["step"]: step for step in read_log(cfg.output_dir) if "val_loss" in step}
    assert sorted(validations) == [0, 4, 6]
    names = {
        "val_loss",
        "val_class_loss",
        "val_teacher_class_loss",
        "val_kd_loss",
        "val_kl",
        "val_top1_agreement",
    }
    names |= {"val_student_entropy", "val_teacher_entropy", "val_acceptance_rate"}
    assert set(validations[0]) == names | {"step"}
    assert validations[6]["val_kl"] < validations[0]["val_kl"]
    assert validations[6]["val_teacher_class_loss"] == pytest.approx(validations[0]["val_teacher_class_loss"])


def test_schedule_metric_loggers_and_log_interval(tmp_path, capsys):
    cfg = make_config(tmp_path, log_every_n_steps=2)
    cfg.lr_scheduler = {
        "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
        "num_warmup_steps": 3,
    }
    cfg.metric_logger = {"_component_": "torchtune.training.metric_logging.StdoutLogger"}
    run_in_process(cfg)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Step ")]
    assert [line.split()[1] for line in lines] == ["2", "4", "6"]
    assert "lr:0.000333" in lines[0]  # second of three warm-up steps to 1e-3, from 0


def test_tensorboard_logger_writes_events(tmp_path):
    cfg = make_config(tmp_path, max_steps_per_epoch=1)
    cfg.metric_logger = {
        "_component_": "torchtune.training.metric_logging.TensorBoardLogger",
        "log_dir": "${output_dir}/tb",
    }
    run_in_process(cfg)
    assert list((tmp_path / "out" / "tb").rglob("events.out.tfevents.*"))


def test_profiler_writes_a_trace(tmp_path):
    cfg = make_config(tmp_path)
    cfg.profiler = {
        "_component_": "torchtune.training.setup_torch_profiler",
        "enabled": True,
        "output_dir": "${output_dir}/profile",
        "cpu": True,
        "cuda": False,
        "xpu": False,
        "wait_steps": 1,
        "warmup_steps": 1,
        "active_steps": 1,
        "num_cycles": 1,
    }
    run_in_process(cfg)
    assert list((tmp_path / "out" / "profile").rglob("*.pt.trace.json*"))


def test_padded_vocabularies_are_cut_to_the_shared_prefix(tmp_path):
    """Qwen's case: one tokenizer, tables padded to different sizes; whatever stands in the padding changes nothing."""
    logs = []
    for padded in (False, True):
        cfg = make_config(tmp_path, output_dir=str(tmp_path / f"out{padded}"), max_steps_per_epoch=3)
        if padded:
            weights = load_file(tmp_path / "teacher" / "model.safetensors")
            for name in ("lm_head.weight", "model.embed_tokens.weight"):
                rows = torch.full((128, weights[name].shape[1]), 50.0)
                weights[name] = torch.cat([weights[name], rows])
            shutil.copytree(tmp_path / "teacher", tmp_path / "padded")
            save_file(weights, tmp_path / "padded" / "model.safetensors")
            cfg.teacher_model.vocab_size = VOCAB + 128
            cfg.teacher_checkpointer = checkpointer_section(tmp_path / "padded")
        run_in_process(cfg)
        logs.append(read_log(cfg.output_dir))
    for step, other in zip(*logs, strict=True):
        for name in ("loss", "kl", "grad_norm", "top1_agreement"):
            assert step[name] == pytest.approx(other[name], rel=1e-5), name


def test_lora_on_the_output_head_trains_it(tmp_path):
    cfg = make_config(tmp_path, "lora", epochs=2)
    cfg.model = model_section("lora", STUDENT, apply_lora_to_output=True)
    cfg.model._component_ = "torchtune.models.llama3.lora_llama3"  # an untied head
    del cfg.model["scale_factor"], cfg.model["tie_word_embeddings"]
    untied = model_section("full", STUDENT, tied=False)
    write_checkpoint(tmp_path / "untied", untied, seed=3)
    cfg.checkpointer = checkpointer_section(tmp_path / "untied")
    run = run_in_process(cfg)
    assert run.student.decoder.output.lora_b.weight.abs().max() > 0
    values = losses(cfg.output_dir)
    assert values[6] < values[0]  # the same rows, an epoch later


@pytest.mark.slow
def test_compile_gives_the_same_losses(tmp_path):
    logs = []
    for flag in (False, True):
        cfg = make_config(tmp_path, output_dir=str(tmp_path / f"out{flag}"), compile=flag, max_steps_per_epoch=2)
        run_in_process(cfg)
        logs.append(losses(cfg.output_dir))
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)


def test_rows_without_a_token_are_microbatches_without_one(tmp_path):
    cfg = make_config(tmp_path, rows=["", "the quick brown fox", "", ""], batch_size=1)
    cfg.dataset_val = cfg.dataset
    run_in_process(cfg)
    found = losses(cfg.output_dir)
    assert [value > 0 for value in found] == [False, True, False, False]
    assert all(map(math.isfinite, found))


def test_pytorchs_own_schedules_work(tmp_path):
    """They know nothing of ``num_training_steps``."""
    schedule = {"_component_": "torch.optim.lr_scheduler.StepLR", "step_size": 2, "gamma": 0.5}
    cfg = make_config(tmp_path, lr_scheduler=schedule, max_steps_per_epoch=4)
    run_in_process(cfg)
    rates = [step["lr"] for step in read_log(cfg.output_dir) if "lr" in step]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])
