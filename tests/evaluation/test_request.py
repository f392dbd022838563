"""The keys of an evaluation: which models, which tasks, and one sentence for what cannot be."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helpers.tiny import STUDENT, checkpointer_section, dataset_section, make_config, model_section
from torchtune_kd.errors import UserError
from torchtune_kd.evaluation import evaluate, read_request
from torchtune_kd.evaluation.latency import LatencySettings


@pytest.fixture
def cfg(tmp_path):
    config = make_config(tmp_path)
    config.dataset_val = dataset_section(tmp_path / "rows.jsonl")
    return config


def export(cfg, epoch):
    """Write what a run leaves in ``epoch_<n>``, as far as its name goes."""
    folder = f"{cfg.output_dir}/epoch_{epoch}"
    OmegaConf.save({}, _made(folder, "model-00001-of-00001.safetensors"))
    return folder


def _made(folder, name):
    Path(folder).mkdir(parents=True)
    return Path(folder) / name


def test_a_training_config_has_its_own_models(cfg):
    request = read_request(cfg)
    assert [source.name for source in request.sources] == ["untrained", "teacher"]
    assert request.reference.name == "teacher" and request.tasks == ("heldout",)
    assert request.latency == LatencySettings() and request.results.name == "results.jsonl"
    export(cfg, 2)
    export(cfg, 10)
    student = {source.name: source for source in read_request(cfg).sources}["student"]
    assert student.checkpointer.get("checkpoint_dir").endswith("epoch_10")
    assert student.checkpointer.get("checkpoint_files") == ["model-00001-of-00001.safetensors"]


def test_models_can_be_chosen(cfg):
    cfg.models = ["teacher"]
    assert [source.name for source in read_request(cfg).sources] == ["teacher"]
    cfg.reference = None
    assert read_request(cfg).reference is None


def test_merged_weights_of_a_quantised_student_are_not_quantised_again(tmp_path):
    sources = read_request(make_config(tmp_path, "qlora")).sources
    assert [source.model.get("quantize_base") for source in sources] == [False, None]


def test_models_alone(cfg):
    """Without a training run: every model is a section of its own."""
    alone = OmegaConf.create(
        {
            "models": {"small": {"model": model_section("full", STUDENT), "checkpointer": cfg.checkpointer}},
            "tokenizer": cfg.tokenizer,
            "output_dir": cfg.output_dir,
            "dtype": "fp32",
            "tasks": ["cities"],
            "latency": {"prompt_tokens": 4, "batch_sizes": [2]},
        }
    )
    request = read_request(alone)
    assert [source.name for source in request.sources] == ["small"] and request.reference is None
    assert request.settings.dtype == "fp32" and request.settings.device == "cpu"
    assert request.latency == LatencySettings(prompt_tokens=4, batch_sizes=(2,))


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("tasks", ["citys"], "did you mean `cities`"),
        ("tasks", "cities", "a list such as"),
        ("models", ["student"], "holds no `epoch_<n>` with merged weights yet"),
        ("models", ["teachr"], "one of untrained, teacher"),
        ("models", {"a": {"model": None}}, "`model` and `checkpointer`"),
        ("models", {}, "list of names, or a section for each model"),
        ("reference", "nobody", "one of untrained, teacher or null"),
        ("latency", {"prompt": 3}, "did you mean `prompt_tokens`"),
        ("latency", {"batch_sizes": [0]}, "at least 1"),
        ("limit", 0, "at least 1 or null"),
        ("items", "yes", "Expected `items` to be bool"),
        ("itmes", True, "did you mean"),
        ("dataset_val", None, "measures on the text of `dataset_val`"),
    ],
)
def test_what_cannot_be_is_one_sentence(cfg, key, value, said):
    cfg.tasks = ["heldout"]
    cfg[key] = value
    with pytest.raises(UserError, match=said):
        read_request(cfg)


def test_distances_need_one_tokenizer(cfg, tmp_path):
    """Another vocabulary is seen before a model is loaded."""
    file = tmp_path / "teacher" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"(?s)`untrained` to `teacher` needs one tokenizer.*one family"):
        evaluate(read_request(cfg))


def test_several_teachers_have_their_names(cfg):
    general = {"name": "general", "model": cfg.teacher_model, "checkpointer": cfg.teacher_checkpointer, "share": 0.5}
    cfg = OmegaConf.merge(cfg, {"teachers": [general, general | {"name": "coder"}]})
    cfg.teacher_model = cfg.teacher_checkpointer = None
    request = read_request(cfg)
    assert [source.name for source in request.sources] == ["untrained", "general", "coder"]
    assert request.reference is None
    cfg.reference = "coder"
    assert read_request(cfg).reference.name == "coder"
    cfg.reference, cfg.teachers[1].name = None, "teacher"
    assert read_request(cfg).reference is None  # null measures none
    del cfg["reference"]
    assert read_request(cfg).reference.name == "teacher"


@pytest.mark.parametrize("name", ["untrained", "student"])
def test_no_teacher_has_the_students_name(cfg, name):
    """Not even before there is a trained student, which would take the teacher's place later."""
    teacher = {"name": name, "model": cfg.teacher_model, "checkpointer": cfg.teacher_checkpointer}
    cfg = OmegaConf.merge(cfg, {"teachers": [teacher]})
    cfg.teacher_model = cfg.teacher_checkpointer = None
    with pytest.raises(UserError, match=rf"`teachers\[0\]` is called `{name}`, as the student .* another `name`\.$"):
        read_request(cfg)


def test_an_export_of_an_adapter_alone_is_no_student(cfg):
    """The other models can be evaluated all the same."""
    _made(f"{cfg.output_dir}/epoch_0", "adapter_config.json").write_text("{}")
    assert [source.name for source in read_request(cfg).sources] == ["untrained", "teacher"]
    cfg.models = ["student"]
    with pytest.raises(UserError, match="with merged weights"):
        read_request(cfg)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("latency", {"prompt_tokens": 60, "new_tokens": 5}, "60 [+] 5 tokens, and the models take 64"),
        ("tokenizer.max_seq_len", 100, "at most 64 tokens"),
    ],
)
def test_what_the_models_cannot_read_is_found_before_they_are_loaded(cfg, tmp_path, key, value, said):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a" * 80}) + "\n")
    cfg.latency = None
    OmegaConf.update(cfg, key, value)
    with pytest.raises(UserError, match=said):
        evaluate(read_request(cfg))


def test_files_that_are_missing_are_found_first(cfg, tmp_path):
    (tmp_path / "student" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors of .* is not in"):
        evaluate(read_request(cfg))


def test_keys_of_neither_kind_are_refused(cfg):
    alone = OmegaConf.create(
        {
            "models": {"a": {"model": cfg.model, "checkpointer": checkpointer_section("x")}},
            "tokenizer": cfg.tokenizer,
            "output_dir": "x",
            "tokenzier": 1,
        }
    )
    with pytest.raises(UserError, match="did you mean `tokenizer`"):
        read_request(alone)
    del alone["tokenzier"], alone["tokenizer"]
    with pytest.raises(UserError, match="Expected the key `tokenizer`"):
        read_request(alone)
