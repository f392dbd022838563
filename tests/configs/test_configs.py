"""Every config under configs/, at any depth: it reads, builds, fits its header, and hides no key that nothing reads."""

import inspect
import json
import os
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune._recipe_registry import get_all_recipes
from torchtune.config._utils import _get_component_from_path
from torchtune.modules import TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear
from torchtune.training import ModelType

import torchtune_kd.losses
from torchtune_kd.cache_teacher.error import SAMPLE, error_of
from torchtune_kd.cache_teacher.request import CacheKeys
from torchtune_kd.config.sections import section_of
from torchtune_kd.config.settings import KEYS, Settings
from torchtune_kd.losses.signals import Head
from torchtune_kd.models.build import check_vocabularies, on_meta
from torchtune_kd.models.nf4 import check_nf4_shapes
from torchtune_kd.models.output_head import output_head
from torchtune_kd.plan import build_models, fits, read_request
from torchtune_kd.plan.communication import sharded_weights
from torchtune_kd.plan.memory import GIB
from torchtune_kd.plan.meta_models import table_bytes, weight_bytes
from torchtune_kd.plan.tracker import Tracker
from torchtune_kd.teachers.live import LiveTeacher
from torchtune_kd.training import UserError, World, read_config
from torchtune_kd.training.optim import build_lr_scheduler, build_profiler

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIGS = CHECKOUT / "configs"
FOUND = sorted(Path(folder) / name for folder, _, names in os.walk(CONFIGS) for name in names if name.endswith("yaml"))
SWEEPS = [path for path in FOUND if path.stem.startswith("sweep")]  # tests/configs/test_sweeps.py
FILES = [path for path in FOUND if path not in SWEEPS]

# What `tune download` fetches: number of *.safetensors files, and the published config.json.
MODELS = {
    "meta-llama/Llama-3.2-1B-Instruct": {"files": 1, "vocab": 128256, "layers": 16, "width": 2048, "tied": True},
    "meta-llama/Meta-Llama-3.1-8B-Instruct": {"files": 4, "vocab": 128256, "layers": 32, "width": 4096, "tied": False},
    "Qwen/Qwen2.5-0.5B-Instruct": {"files": 1, "vocab": 151936, "layers": 24, "width": 896, "tied": True},
    "Qwen/Qwen2.5-1.5B-Instruct": {"files": 1, "vocab": 151936, "layers": 28, "width": 1536, "tied": True},
    "Qwen/Qwen2.5-7B-Instruct": {"files": 4, "vocab": 152064, "layers": 28, "width": 3584, "tied": False},
    "Qwen/Qwen2.5-Coder-7B-Instruct": {"files": 4, "vocab": 152064, "layers": 28, "width": 3584, "tied": False},
    "HuggingFaceTB/SmolLM2-135M-Instruct": {"files": 1, "vocab": 49152, "layers": 30, "width": 576, "tied": True},
}

# 1.5: the temperature that the demo's experiment log settled on
TEMPERATURES = {
    "135M_to_15L_KD_full_single_device": 1.5,
    "15L_to_15L_KD_born_again_full_single_device": 1.0,
    "1B_KD_self_base_lora_single_device": 1.0,
}

each_config = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())


def load(path: Path) -> DictConfig:
    return OmegaConf.load(path)


def is_distributed(path: Path) -> bool:
    return path.stem.endswith("_distributed")


def header(path: Path) -> str:
    """The comment lines above the first key."""
    return path.read_text().split("\noutput_dir:")[0]


def sections(node: Any, path: str = "") -> list[tuple[str, dict]]:
    """Every mapping with a ``_component_``, at any depth, with its dotted path."""
    found = [(path, node)] if isinstance(node, dict) and "_component_" in node else []
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return found + [s for key, child in children for s in sections(child, f"{path}.{key}".lstrip("."))]


def teachers(plain: dict) -> list[tuple[dict, dict]]:
    """Model and checkpointer of every teacher that has any; the student's own past has none."""
    if "teachers" in plain:
        return [(entry["model"], entry["checkpointer"]) for entry in plain["teachers"] if "self" not in entry]
    return [(plain["teacher_model"], plain["teacher_checkpointer"])]


@cache
def meta_model(section: str) -> TransformerDecoder:
    """A model on the meta device from its section as JSON, so that files with equal sections build it once."""
    settings = Settings(output_dir="", device="cpu", dtype="bf16")
    return on_meta(section_of("model", json.loads(section)), settings, World(torch.device("cpu")))


def model_of(cfg: DictConfig, name: str = "model") -> TransformerDecoder:
    return meta_model(json.dumps(OmegaConf.to_container(cfg[name], resolve=True)))


def test_all_files_are_walked_and_listed():
    assert len(FOUND) == len(list(CONFIGS.rglob("*.yaml"))) >= 15
    assert not list(CONFIGS.rglob("*.yml")), "tune ls looks for *.yaml alone"
    names = {config.name for recipe in get_all_recipes() for config in recipe.configs}
    listed = {n for n in names if n.startswith("torchtune_kd/")}
    assert {f"torchtune_kd/{path.relative_to(CONFIGS).with_suffix('').as_posix()}" for path in FOUND} == listed


@each_config
def test_everything_a_config_names_can_be_built(path):
    cfg = load(path)
    plain = OmegaConf.to_container(cfg, resolve=True)
    found = dict(sections(plain))
    assert {"model", "checkpointer", "dataset", "kd_loss"} <= found.keys()
    for where, section in found.items():
        takes = inspect.signature(_get_component_from_path(section["_component_"])).parameters
        if "load_dataset_kwargs" in takes:  # handed on to the reader of local files
            takes = takes | inspect.signature(datasets.load_dataset).parameters
        assert section.keys() - {"_component_"} <= takes.keys(), where
    for checkpointer in (found["checkpointer"], *(files for _, files in teachers(plain))):
        assert hasattr(ModelType, checkpointer["model_type"])

    config = read_config(cfg, distributed=is_distributed(path))
    settings = config.settings
    assert (settings.dtype, settings.resume_from_checkpoint, "loss" in cfg) == ("bf16", False, False)
    student = model_of(cfg)
    for teacher in (meta_model(json.dumps(model)) for model, _ in teachers(plain)):
        larger = sum(p.numel() for p in teacher.parameters()) - sum(p.numel() for p in student.parameters())
        assert larger == 0 if "born_again" in path.stem else larger > 0
        assert check_vocabularies(student, teacher) == min(m.tok_embeddings.num_embeddings for m in (student, teacher))

    assert config.kd_loss.build().temperature == TEMPERATURES.get(path.stem, 2.0)
    optimizer = config.optimizer.build([nn.Parameter(torch.zeros(2))])
    assert build_lr_scheduler(config.lr_scheduler, optimizer, total_steps=200).last_epoch == 0
    assert build_profiler(config.profiler, torch.device("cpu")) is not None


@each_config
def test_header_says_how_to_run_the_file_it_stands_in(path):
    name = f"torchtune_kd/{path.relative_to(CONFIGS).with_suffix('').as_posix()}"
    recipe = "kd_distributed" if is_distributed(path) else "kd_single_device"
    assert f"torchtune_kd/{recipe}" in {known.name for known in get_all_recipes()}
    stock = {c.name for r in get_all_recipes() for c in r.configs}
    ours = []
    for line in re.findall(r"^#   (tune run .*)$", header(path), re.MULTILINE):
        words = shlex.split(line)
        at = words.index("--config")
        assert words[at + 1] in stock
        if words[at - 1].startswith("torchtune_kd/"):
            ours.append((words[at - 1], words[at + 1]))
            assert ("--nproc_per_node" in words) == is_distributed(path)
            overridden = OmegaConf.merge(load(path), OmegaConf.from_dotlist(words[at + 2 :]))
            read_config(overridden, distributed=is_distributed(path))
    first = []  # what has to be there before
    if "teacher_cache" in load(path):
        first.append(("torchtune_kd/cache_teacher", name))
    if "born_again" in path.stem:
        first.append(("torchtune_kd/kd_single_device", "torchtune_kd/smollm2/135M_to_15L_KD_full_single_device"))
    assert ours == [*first, *[(f"torchtune_kd/{recipe}", name)] * 2]
    assert load(path).output_dir.startswith("/tmp/torchtune_kd/")


@each_config
def test_downloads_of_the_header_are_the_checkpoints_of_the_config(path):
    cfg = load(path)
    folders = dict(re.findall(r"tune download (\S+) --output-dir (\S+)", header(path)))
    seen = set()
    plain = OmegaConf.to_container(cfg, resolve=True)
    for at, (section, checkpointer) in enumerate([(plain["model"], plain["checkpointer"]), *teachers(plain)]):
        decoder = meta_model(json.dumps(section))
        repo = next((repo for repo, folder in folders.items() if folder == checkpointer["checkpoint_dir"]), None)
        if repo is None and at == 0:  # a pruned student, which no hub has
            assert path.parent.name == "smollm2"
            seen.add(check_pruning(path, cfg, folders))
            assert len(decoder.layers) == 15
            continue
        if repo is None:  # the epoch of the generation before
            before = load(CONFIGS / "smollm2" / "135M_to_15L_KD_full_single_device.yaml")
            assert checkpointer["checkpoint_dir"] == f"{before.output_dir}/epoch_0" and section == plain["model"]
            assert checkpointer["checkpoint_files"] == ["model-00001-of-00001.safetensors"]  # as a run exports it
            continue
        seen.add(repo)
        facts, files = MODELS[repo], checkpointer["checkpoint_files"]
        n = facts["files"]
        assert files == (
            ["model.safetensors"] if n == 1 else [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
        )
        built = {
            "files": n,
            "vocab": decoder.tok_embeddings.num_embeddings,
            "layers": len(decoder.layers),
            "width": decoder.tok_embeddings.embedding_dim,
            "tied": isinstance(decoder.output, TiedLinear),
        }
        assert built == facts
    assert seen == folders.keys()
    tokenizer_files = [cfg.tokenizer[key] for key in ("path", "merges_file") if key in cfg.tokenizer]
    assert all(any(file.startswith(f"{folder}/") for folder in folders.values()) for file in tokenizer_files)


def check_pruning(path: Path, cfg: DictConfig, folders: dict[str, str]) -> str:
    """See that the head's commands make the student, and return the repository of what is pruned."""
    from torchtune_kd.tools.prune import _parse as prune_arguments

    (prune,) = re.findall(r"^#   python -m torchtune_kd\.tools\.prune (.*)$", header(path), re.MULTILINE)
    (options,) = re.findall(r"^#   (--strategy influence .*)$", header(path), re.MULTILINE)
    args = prune_arguments(shlex.split(prune))
    assert (args.strategy, args.num_layers, str(args.output_dir)) == ("even", 15, cfg.checkpointer.checkpoint_dir)
    (repo,) = [repo for repo, folder in folders.items() if folder == str(args.checkpoint_dir)]
    args = prune_arguments(shlex.split(prune.replace("--strategy even", options)))
    assert args.strategy == "influence"
    assert args.model == cfg.teacher_model._component_ and args.tokenizer == cfg.tokenizer._component_
    return repo


@pytest.mark.heavy  # a second each
@each_config
def test_misspelt_keys_are_found_wherever_they_stand(path):
    plain = yaml.safe_load(path.read_text())
    folders = [key for key in plain if key not in KEYS]
    assert all(f"${{{key}}}" in path.read_text() for key in folders)
    for key in plain.keys() - set(folders):
        refused(path, plain | {key + key[-1]: plain[key]}, key + key[-1], key)
    for where, section in sections(plain):
        takes = inspect.signature(_get_component_from_path(section["_component_"])).parameters
        where = re.sub(r"\.(\d+)", r"[\1]", where)
        for key in section.keys() - {"_component_"}:
            if key in takes:  # else load_dataset is to find it, see below
                wrong = OmegaConf.create(plain)
                OmegaConf.update(wrong, f"{where}.{key + key[-1]}", section[key], force_add=True)
                refused(path, wrong, f"{where}.{key + key[-1]}", key)


def refused(path: Path, content: dict | DictConfig, wrong: str, meant: str) -> None:
    with pytest.raises(UserError) as caught:
        read_config(OmegaConf.create(content), distributed=is_distributed(path))
    assert f"`{wrong}`" in str(caught.value) and f"did you mean `{meant}`?" in str(caught.value)


def test_keys_that_only_the_reader_of_files_knows_are_found_when_it_is_called(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    cfg = load(CONFIGS / "smollm2" / "135M_to_15L_KD_full_single_device.yaml")
    cfg.data_dir, cfg.dataset.data_filess = str(tmp_path), "x"
    with pytest.raises(UserError, match=r"`dataset` cannot be built.*data_filess"):
        section_of("dataset", cfg.dataset).build(object())


@each_config
def test_options_that_are_commented_out_work(path):
    text = path.read_text()
    block = re.search(r"^# dataset_val:\n(?:# .*\n)+", text, re.MULTILINE)
    if block is None:
        assert "\ndataset_val:\n" in text
        return
    cfg = OmegaConf.create(text + re.sub(r"^# ", "", block.group(), flags=re.MULTILINE))
    config = read_config(cfg, distributed=is_distributed(path))
    settings = config.settings
    assert settings.run_val_every_n_steps and settings.max_val_batches and settings.batch_size_val


@each_config
def test_comment_names_every_other_divergence(path):
    named = re.search(r"# Other divergences: (.*)", path.read_text()).group(1).split(", ")
    single = {n for n in torchtune_kd.losses.__all__ if not n.startswith("KD") and "Chunked" not in n}
    assert {*named, "ForwardKLLoss"} == single
    for name in named:
        cfg = load(path)
        cfg.kd_loss._component_ = f"torchtune_kd.losses.{name}"
        assert type(section_of("kd_loss", cfg.kd_loss).build()).__name__ == name


@pytest.mark.parametrize("path", [path for path in FILES if "cached" in path.stem], ids=lambda path: path.stem)
def test_header_says_what_the_writing_of_a_cache_takes(path):
    """A teacher, and beside it a forward, or at the beginning a measurement of what is lost, whichever takes more."""
    cfg = load(path)
    cfg.teacher_cache = None
    _, config, layout = read_request(cfg)
    decoder = build_models(config, layout.shards).teachers[0].model
    weights = sharded_weights(decoder, config.settings, layout)
    held = weights.share + table_bytes(decoder) if layout.sharded else weight_bytes(decoder)
    head = output_head(decoder)

    def beside(run):
        tracker = Tracker()
        tracker.phase = "beside"
        tracker.hold("teacher", (*decoder.parameters(), *decoder.buffers()))
        with tracker:
            run()
        return tracker.peaks["beside"] - weight_bytes(decoder)

    def measure():
        states, labels = (
            head[0].new_empty(SAMPLE, head[0].shape[1]),
            torch.empty(SAMPLE, dtype=torch.long, device="meta"),
        )
        with pytest.raises(RuntimeError, match="meta tensors"):  # its results have no values
            error_of(states, states, labels, Head(*head))

    tokens = torch.zeros(1, CacheKeys("").tokens_per_batch, dtype=torch.long, device="meta")
    forward = weights.rest + weights.layers + beside(lambda: LiveTeacher(decoder)(tokens))
    total = held + max(forward, weights.rest + beside(measure))
    room = next(f"{gb} GB" for gb in (12, 16, 24, 32) if fits(total, gb * GIB))
    said = header(path).replace("\n# ", " ")
    processes = f"{layout.processes} process{'es' * (layout.processes > 1)}"
    assert f"{total / GIB:.1f} GiB per device (computed, not measured; {processes}, 16,384 tokens a forward)" in said
    assert f"one {room} GPU" in said and f"{weight_bytes(decoder) / GIB:.1f} GiB of host memory" in said


def test_nf4_fits_the_numbers_of_processes_that_the_header_names():
    path = CONFIGS / "llama3_2" / "8B_to_1B_KD_qlora_distributed.yaml"
    sizes = re.search(r"give for ([\d, and]+) processes", header(path).replace("\n# ", " ")).group(1)
    model = model_of(load(path), "model")
    for size in map(int, re.findall(r"\d+", sizes)):
        check_nf4_shapes(model, size)
    for size in (3, 128):
        with pytest.raises(ValueError, match=f"each of {size} ranks"):
            check_nf4_shapes(model, size)
