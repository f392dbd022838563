"""Each mistake ends before training, with one sentence that says what, where and what to do; nothing is lost."""

import json
import re
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config, training

from helpers.tiny import (
    STUDENT,
    TEACHER,
    make_config,
    model_section,
    run_in_process,
    run_tune,
    write_rows,
)
from torchtune_kd.models.build import check_sharded_layers
from torchtune_kd.recipes.kd import KDRecipe
from torchtune_kd.training import RunError, UserError, read_config


def refuse(cfg) -> str:
    """The one sentence with which setting up ``cfg`` ends."""
    with pytest.raises(UserError) as caught:
        recipe = KDRecipe(cfg)
        recipe.setup()
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", "?", "!")), message
    return message


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("batchsize", 4, "`batchsize`.*`batch_size`"),
        ("kd_loss.temprature", 2.0, "kd_loss.temprature.*did you mean `temperature`"),
        ("model.num_layer", 2, "model.num_layer.*did you mean `num_layers`"),
        ("tokenizer.max_seq_length", 2, "tokenizer.max_seq_length.*did you mean `max_seq_len`"),
        (
            "loss",
            {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "delete the `loss` section",
        ),
        ("fsdp_cpu_offload", True, "kd_distributed"),
        ("kd_loss.temperature", 0.0, "temperature.*0"),
        ("kd_loss.temperature", -1.0, "temperature.*-1"),
        ("kd_loss._component_", "torchtune.modules.loss.ForwardKLLoss", "torchtune_kd.losses"),
        ("kd_loss._component_", "torchtune_kd.losses.ForwardKL", "torchtune_kd.losses.ForwardKL"),
        ("kd_ratio", 1.5, "kd_ratio.*between 0 and 1.*1.5"),
        ("kd_ratio", -0.1, "kd_ratio.*between 0 and 1.*-0.1"),
        ("kd_ratio", "half", "kd_ratio.*'half'"),
        ("dtype", "fp16", "dtype.*fp32 or bf16.*fp16"),
        ("epochs", 0, "epochs.*at least 1.*0"),
        ("clip_grad_norm", 0.0, "clip_grad_norm.*above 0"),
        ("save_every_n_steps", 0, "save_every_n_steps.*at least 1 or null"),
        ("keep_last_n", 0, "keep_last_n.*at least 1"),
        ("resume_despite_changes", True, "no use without `resume_from_checkpoint: True`"),
        ("teacher_head", "fp8", "Expected `teacher_head` to be float8 or null, got 'fp8'"),
        ("teacher_head", {"_component_": "torch.nn.Linear"}, "Expected `teacher_head` to be float8 or null"),
        ("teacher_haed", "float8", "`teacher_haed`.*`teacher_head`"),
        ("seed", -1, "seed.*from 0 to 4294967295.*-1"),
        ("cudnn_deterministic_mode", "abc", "cudnn_deterministic_mode.*default, warn, error.*abc"),
        ("kd_loss", "ForwardKLLoss", "`kd_loss` to be a section.*'ForwardKLLoss'"),
        ("dataset._component_", None, "`dataset._component_`.*missing"),
        ("optimizer._component_", "torch.optim.Adamw", "torch.optim.Adamw.*did you mean torch.optim.AdamW"),
        ("optimizer._component_", "torch.optim.LBFGS", "LBFGS, whose `step` wants `closure`"),
        ("optimizer.lr", "1e-4x", "`optimizer` cannot be built from lr='1e-4x'"),
        ("checkpointer.model_type", "LLAMA3_3", "'LLAMA3_3' under `checkpointer.model_type`.*did you mean `LLAMA3"),
        ("dataset_val", [], "at least one section under `dataset_val`, got an empty list"),
        ("checkpointer.checkpoint_files", [], "`checkpointer.checkpoint_files`.*empty"),
        ("teacher_checkpointer.checkpoint_files", [], "`teacher_checkpointer.checkpoint_files`.*empty"),
        ("model.embed_dim", -4, "`model` cannot be built"),
        ("kd_loss.scale_by_temperature_squared", "no", "scale_by_temperature_squared must be True or False.*'no'"),
        ("dataset.column", "words", "nothing under 'words': correct the names of columns"),
        ("keep_best", "val_loss", "keep_best.*dataset_val"),
        ("max_skipped_steps", 0, "max_skipped_steps.*at least 1"),
        ("run_val_every_n_steps", 5, "dataset_val"),
        ("enable_activation_offloading", True, "device.*cpu"),
        ("checkpointer.checkpoint_files", ["model-00001.safetensors"], "model-00001.safetensors.*is not in"),
        ("teacher_checkpointer.checkpoint_dir", "/nowhere/teacher", "/nowhere/teacher.*does not exist"),
        ("save_adapter_weights_only", True, "full-weight"),
        ("device", "gpu", "device.*cpu or cuda.*gpu"),
        ("kd_loss._component_", "torchtune_kd.losses.KDLoss", "torchtune_kd.losses.ForwardKLLoss"),
        ("kd_loss._component_", "torchtune_kd.losses.JSDWithChunkedOutputLoss", "write torchtune_kd.losses.JSDLoss"),
        ("metric_logger.project", "x", "metric_logger.project"),
        ("max_val_batches", 3, "max_val_batches.*dataset_val"),
        ("batch_size_val", 3, "batch_size_val.*dataset_val"),
        ("metric_logger", {"_component_": "torchtune.training.metric_logging.WandBLogger"}, "metric_logger.*wandb"),
        ("checkpointer.adapter_checkpoint", "adapter_0.pt", "checkpointer.adapter_checkpoint: null"),
        ("checkpointer.should_load_recipe_state", True, "checkpointer.should_load_recipe_state: False"),
        ("checkpointer.resume_from_checkpoint", True, "`resume_from_checkpoint: True` at the top"),
        ("dataset.data_files", "/nowhere/rows.jsonl", "section `dataset`.*/nowhere/rows.jsonl"),
        ("tokenizer.path", "/nowhere/tokenizer.json", "section `tokenizer`.*/nowhere/tokenizer.json"),
        ("optimizer", None, "section `optimizer`.*missing"),
        ("teacher_model", None, "section `teacher_model`.*missing"),
        ("optimizer.lr", -1.0, "optimizer.*learning rate"),
    ],
)
def test_config_mistakes(tmp_path, key, value, said):
    cfg = make_config(tmp_path)
    OmegaConf.update(cfg, key, value)
    message = refuse(cfg)
    assert re.search(said, message), message


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("lora_attn_modules", ["q_pro", "v_proj"], "'q_pro' in `model.lora_attn_modules`: did you mean `q_proj`"),
        ("lora_rank", 0, "`model.lora_rank`.*at least 1.*0"),
    ],
)
def test_adapters_that_cannot_be(tmp_path, key, value, said):
    """torchtune's builders leave out a module that they do not know."""
    assert re.search(said, refuse(make_config(tmp_path, "lora", **{f"model__{key}": value})))


def test_a_list_of_datasets_is_checked_part_by_part(tmp_path):
    cfg = make_config(tmp_path)
    cfg.dataset = [cfg.dataset, {"source": "json"}]
    assert "`dataset[1]._component_`" in refuse(cfg)


def test_interpolated_names_are_read(tmp_path):
    cfg = make_config(tmp_path)
    cfg.my_lr = 1e-3
    cfg.optimizer.lr = "${my_lr}"
    recipe = KDRecipe(cfg)
    recipe.setup()
    assert recipe._run.optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a host without CUDA")
def test_cuda_without_cuda(tmp_path):
    assert "CUDA" in refuse(make_config(tmp_path, device="cuda"))


def test_vocabularies_that_do_not_fit(tmp_path):
    cfg = make_config(tmp_path)
    cfg.teacher_model.vocab_size = 384 + 1024
    message = refuse(cfg)
    assert "384" in message and "1408" in message


def test_tokenizer_with_more_ids_than_the_models(tmp_path):
    cfg = make_config(tmp_path)
    for name in ("model", "teacher_model"):
        cfg[name].vocab_size = 128
    message = refuse(cfg)
    assert "128" in message and "tokenizer" in message


def test_tokenizers_that_give_other_ids(tmp_path):
    cfg = make_config(tmp_path)
    path = tmp_path / "teacher" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))
    message = refuse(cfg)
    assert "'a'" in message or "'b'" in message


def test_adapters_of_the_teacher_that_nothing_would_load(tmp_path):
    cfg = make_config(tmp_path)
    cfg.teacher_model = model_section("lora", TEACHER, tied=False)
    message = refuse(cfg)
    assert "lora_llama3_2 under `teacher_model` makes adapters" in message and "merged weights" in message


def test_nf4_shape_that_cannot_be_quantised(tmp_path):
    cfg = make_config(tmp_path)
    cfg.model = model_section("qlora", STUDENT | {"embed_dim": 192, "num_heads": 3, "num_kv_heads": 1})
    message = refuse(cfg)
    assert "16384" in message and "192" in message and "layers.0" in message


def test_checkpoint_of_another_model(tmp_path):
    cfg = make_config(tmp_path)
    cfg.model.num_layers = 2
    assert "layers.1" in refuse(cfg)
    cfg.model.num_layers = 1
    cfg.model.intermediate_dim = 512
    message = refuse(cfg)
    assert "256" in message and "512" in message
    cfg = make_config(tmp_path)
    cfg.teacher_model.tie_word_embeddings = True
    assert "output.weight" in refuse(cfg)


def test_a_checkpoint_cut_short_by_a_broken_download(tmp_path):
    cfg = make_config(tmp_path)
    path = tmp_path / "teacher" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    message = refuse(cfg)
    assert "`teacher_checkpointer`" in message and str(tmp_path / "teacher") in message


def test_keys_of_the_distributed_recipe(tmp_path):
    cfg = make_config(tmp_path, fsdp_cpu_offload=True)
    with pytest.raises(UserError, match="device` is cpu"):
        read_config(cfg, distributed=True)
    for names, said in ((["layers"], "list of layers"), (["tok_embeddings"], "output head"), (["nothing"], "has not")):
        model = config.instantiate(cfg.model)
        with pytest.raises(UserError, match=said):
            check_sharded_layers(model, names)


def test_every_stock_config_moves_over_by_the_three_lines_of_the_readme():
    """Delete the two lines of `loss`, change the one that names the KD loss."""
    folder = Path(str(distribution("torchtune").locate_file("recipes/configs")))
    paths = [path for path in folder.rglob("*.yaml") if "_KD_" in path.name]
    assert len(paths) >= 4
    for path in paths:
        cfg = OmegaConf.load(path)
        del cfg["loss"]
        cfg.kd_loss._component_ = "torchtune_kd.losses.ForwardKLLoss"
        read_config(cfg, distributed="distributed" in path.name)


def test_empty_dataset(tmp_path):
    cfg = make_config(tmp_path)
    cfg.dataset = {"_component_": "helpers.tiny.empty_dataset"}
    message = refuse(cfg)
    assert "`dataset`" in message and "empty" in message
    cfg = make_config(tmp_path)
    (tmp_path / "empty.csv").write_text("text\n")
    cfg.dataset.source, cfg.dataset.data_files = "csv", str(tmp_path / "empty.csv")
    message = refuse(cfg)
    assert "`dataset`" in message and "no data" in message


@pytest.mark.parametrize("packed", [False, True])
def test_sequence_longer_than_the_model_takes(tmp_path, packed):
    cfg = make_config(tmp_path, tokenizer__max_seq_len=80 if packed else None, dataset__packed=packed)
    write_rows(tmp_path / "rows.jsonl", ["short", "long " * 20])
    message = refuse(cfg)
    assert "64" in message and ("80" if packed else "100") in message


def test_a_finished_run_is_not_written_over(tmp_path):
    cfg = make_config(tmp_path, epochs=2, max_steps_per_epoch=1)
    run_in_process(cfg)
    saved = {path: path.read_bytes() for path in (tmp_path / "out" / "epoch_1").iterdir() if path.is_file()}
    message = refuse(cfg)
    assert str(tmp_path / "out") in message and "overwrite_output_dir" in message
    assert all(path.read_bytes() == content for path, content in saved.items())
    cfg.overwrite_output_dir, cfg.epochs = True, 1
    run_in_process(cfg)
    assert [path.name for path in (tmp_path / "out").glob("epoch_*")] == ["epoch_0"]  # no previous_run epoch_1


def test_the_checkpoint_a_run_starts_from_is_not_replaced(tmp_path):
    cfg = make_config(tmp_path, max_steps_per_epoch=1)
    run_in_process(cfg)
    cfg.overwrite_output_dir = True
    cfg.checkpointer.checkpoint_dir = str(tmp_path / "out" / "epoch_0")
    cfg.checkpointer.checkpoint_files = [path.name for path in (tmp_path / "out" / "epoch_0").glob("*.safetensors")]
    assert "would replace" in refuse(cfg)


def test_a_save_that_fails_keeps_the_old_run(tmp_path, monkeypatch):
    cfg = make_config(tmp_path, max_steps_per_epoch=1)
    run_in_process(cfg)
    saved = {path.name: path.read_bytes() for path in (tmp_path / "out" / "epoch_0").iterdir() if path.is_file()}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.FullModelHFCheckpointer, "save_checkpoint", full_disk)
    cfg.overwrite_output_dir = True
    with pytest.raises(RunError, match="No space"):
        run_in_process(cfg)
    kept = tmp_path / "out" / "epoch_0"
    assert {path.name: path.read_bytes() for path in kept.iterdir() if path.is_file()} == saved


def test_the_user_sees_one_sentence_and_no_traceback(tmp_path):
    cfg = make_config(tmp_path, kd_ratio=2.0)
    result = run_tune(cfg, "torchtune_kd/kd_single_device", check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: Expected `kd_ratio` to be between 0 and 1, got 2.0: change it."
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [2])
def test_too_few_devices(tmp_path, nproc):
    if torch.cuda.device_count() >= nproc:
        nproc = torch.cuda.device_count() + 1
    result = run_tune(make_config(tmp_path, device="cuda"), "torchtune_kd/kd_distributed", nproc=nproc, check=False)
    assert result.returncode != 0
    assert f"--nproc_per_node is {nproc} and this host has {torch.cuda.device_count()}" in result.stderr


def test_a_run_that_fails_early_leaves_the_old_one(tmp_path):
    """A run that fails before its first checkpoint leaves an overwritable folder as it was."""
    cfg = make_config(tmp_path, max_steps_per_epoch=1)
    run_in_process(cfg)
    before = sorted(path.name for path in (tmp_path / "out" / "epoch_0").iterdir())
    cfg.overwrite_output_dir = True
    cfg.optimizer.lr = -1.0
    refuse(cfg)
    assert sorted(path.name for path in (tmp_path / "out" / "epoch_0").iterdir()) == before
