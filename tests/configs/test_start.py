"""Every shipped config trains with the tokenizer of its models, on small models of the true vocabulary."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config

from helpers.assets import llama3_tokenizer, qwen2_5_tokenizer, smollm2_folder
from helpers.forked import ForkedRun, needs_fsdp2_on_a_cpu
from helpers.tiny import read_log
from torchtune_kd import cache_teacher
from torchtune_kd.config.checks import check_tokenizer
from torchtune_kd.data.batches import check_ids
from torchtune_kd.distributed.world import World
from torchtune_kd.plan import as_dict, plan_run, read_request
from torchtune_kd.training import UserError
from torchtune_kd.training.signals import StopRequests

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*_KD_*.yaml"))  # sweeps are no runs
AT_NIGHT = (  # others are much like them
    "/1.5B_to_0.5B",
    "/7B_to_1.5B_KD_full",
    "/7B_to_1.5B_KD_lora_distributed",
    "llama3_2/8B_to_1B_KD_full_single",
    "qlora_single",
    "cached_lora_single",
    "born_again",
)
EACH = [
    pytest.param(path, marks=pytest.mark.nightly) if any(each in str(path) for each in AT_NIGHT) else path
    for path in FILES
]
SMALL = {"num_heads": 4, "num_kv_heads": 2, "embed_dim": 256, "intermediate_dim": 512, "max_seq_len": 512}
# the builders behind those of the configs, which take sizes, and what each model keeps of its own
BUILDERS = {
    "llama3_2": ("torchtune.models.llama3_2.{}llama3_2", {"vocab_size": 128256}),
    "llama3_1": ("torchtune.models.llama3_1.{}llama3_1", {"vocab_size": 128256}),
    "qwen2_5": ("torchtune.models.qwen2.{}qwen2", {"vocab_size": 151936}),
}
ROWS = [
    {"instruction": "Count from one to three.", "input": "", "output": "One, two, three."},
    {"instruction": "Is <|image|> a word?", "input": "<|image|>", "output": "No: 한국어도 아닙니다."},
]


def overrides(path: Path, folder: Path) -> dict[str, Any]:
    """Make the config at ``path`` small, local and random: values by dotted key; the rest is as it is shipped."""
    cfg = OmegaConf.load(path)
    values = {
        "output_dir": folder / "out",
        "device": "cpu",
        "random_weights": True,
        "checkpointer": None,
        "epochs": 1,
        "max_steps_per_epoch": 2,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "metric_logger.filename": "log.txt",
    }
    teachers = {"teacher_model": "teacher_checkpointer"} if "teacher_model" in cfg else {}
    for index, entry in enumerate(cfg.get("teachers", ())):
        teachers |= {f"teachers[{index}].model": f"teachers[{index}].checkpointer"} if "model" in entry else {}
    values |= dict.fromkeys(teachers.values())
    if "teacher_cache" in cfg:
        values["teacher_cache"] = folder / "cache"
    rows = folder / "train.jsonl"
    if path.parent.name == "smollm2":
        for name in ("train", "val"):
            (folder / f"{name}.jsonl").write_text(
                "".join(json.dumps({"text": row["output"]}) + "\n" for row in ROWS * 4)
            )
        values |= {"tokenizer_dir" if "tokenizer_dir" in cfg else "teacher_dir": smollm2_folder(), "data_dir": folder}
        return values | {"model.num_layers": 1, "teacher_model.num_layers": 2}
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    values |= {"dataset.source": "json", "dataset.data_files": rows}
    if path.parent.name == "llama3_2":
        values["tokenizer.path"] = llama3_tokenizer()
    else:
        values["tokenizer.path"], values["tokenizer.merges_file"] = qwen2_5_tokenizer(folder)
    for name in ("model", *teachers):
        written = OmegaConf.select(cfg, name)._component_
        module, _, builder = written.removeprefix("torchtune.models.").partition(".")
        component, sizes = BUILDERS[module]
        if "_7b_" in builder:
            sizes = {"vocab_size": 152064}
        if name == "model" and module != "llama3_1" and "_7b_" not in builder:
            sizes = sizes | {"tie_word_embeddings": True}
        component = component.format("lora_" if "lora" in builder else "")
        if builder.startswith("qlora"):
            sizes = sizes | {"quantize_base": True}
        layers = 1 if name == "model" else 2
        for key, value in ({"_component_": component, "num_layers": layers} | SMALL | sizes).items():
            values[f"{name}.{key}"] = value
    return values


def small(path: Path, folder: Path) -> DictConfig:
    cfg = OmegaConf.load(path)
    for key, value in overrides(path, folder).items():
        OmegaConf.update(cfg, key, str(value) if isinstance(value, Path) else value, force_add=True)
    unread = {"student_dir"} | ({"teacher_dir"} if "tokenizer_dir" in cfg else set())  # by any key
    return OmegaConf.masked_copy(cfg, [key for key in cfg if key not in unread])


@pytest.mark.heavy
@pytest.mark.parametrize("path", EACH, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_a_shipped_config_trains_two_steps_with_its_tokenizer(path, tmp_path):
    cfg = small(path, tmp_path)
    size = 2 if path.stem.endswith("_distributed") else 1
    if "teacher_cache" in cfg:
        cache_teacher.write_cache(cache_teacher.read_request(cfg), World(torch.device("cpu")), StopRequests())
    ForkedRun(cfg, size).finish()
    steps = [step for step in read_log(cfg.output_dir) if "loss" in step]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(0 < step["loss"] < 50 and 0 < step["grad_norm"] < 1e3 for step in steps)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["kd_single_device", pytest.param("kd_distributed", marks=pytest.mark.nightly)])
def test_tune_run_starts_llama_with_its_tokenizer(recipe, tmp_path):
    """The command of the README, typed with the overrides that make it small."""
    name = f"llama3_2/8B_to_1B_KD_lora_{recipe.removeprefix('kd_')}"
    processes = []
    if recipe == "kd_distributed":
        needs_fsdp2_on_a_cpu()
        processes = ["--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    tune = Path(sys.executable).parent / "tune"
    written = overrides(CONFIGS / f"{name}.yaml", tmp_path).items()
    small_and_local = [f"{key}={'null' if value is None else value}" for key, value in written]
    done = subprocess.run(
        [tune, "run", *processes, f"torchtune_kd/{recipe}", "--config", f"torchtune_kd/{name}", *small_and_local],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert [step["step"] for step in read_log(tmp_path / "out")] == [1, 2]


@pytest.mark.heavy  # the tokenizer is downloaded
def test_text_gives_no_id_beyond_llamas_rows():
    tokenizer = config.instantiate(
        OmegaConf.create({"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": str(llama3_tokenizer())})
    )
    assert tokenizer.vocab_size == 128257  # <|image|> is id 128256
    check_tokenizer(tokenizer, 128256)
    assert max(tokenizer.encode("<|image|><|reserved_special_token_5|> a word", True, True)) < 128256
    check_ids({"tokens": [0, 128255]}, 3, "dataset", 128256)
    with pytest.raises(UserError, match=r"row 3 of `dataset` holds 128256"):
        check_ids({"tokens": [0, 128256]}, 3, "dataset", 128256)
    with pytest.raises(UserError, match=r"row 3 of `dataset` holds -1"):
        check_ids({"tokens": [-1, 128256]}, 3, "dataset", 128256)
    with pytest.raises(UserError, match="49152 ids, but the one under `tokenizer` has 128257"):
        check_tokenizer(tokenizer, 49152)


@pytest.mark.heavy
def test_a_row_with_an_image_is_named_before_models_load(tmp_path):
    cfg = small(CONFIGS / "llama3_2" / "8B_to_1B_KD_full_single_device.yaml", tmp_path)
    cfg.dataset = {"_component_": "helpers.tiny.image_dataset"}
    run = ForkedRun(cfg)
    assert run.join() == [2]
    assert "row 1 of `dataset` holds 128256" in run.output()


@pytest.mark.heavy
def test_plan_checks_the_tokenizer_where_its_file_is_there(tmp_path):
    path = CONFIGS / "llama3_2" / "8B_to_1B_KD_lora_single_device.yaml"
    missing = "the tokenizer fits the models: /tmp/Llama-3.2-1B-Instruct/original/tokenizer.model is not there"
    cfg = small(path, tmp_path)
    assert not any(missing in said for said in as_dict(plan_run(*read_request(cfg)))["assumptions"])
    for name in ("model", "teacher_model"):
        cfg[name].vocab_size = 49152
    with pytest.raises(UserError, match="49152 ids, but the one under `tokenizer` has 128257"):
        plan_run(*read_request(cfg))
    cfg.tokenizer.path = "/tmp/Llama-3.2-1B-Instruct/original/tokenizer.model"
    assert any(missing in said for said in as_dict(plan_run(*read_request(cfg)))["assumptions"])
