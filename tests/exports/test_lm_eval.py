"""Tasks of lm-eval through our model class give what lm-eval's own Hugging Face model gives on the same export."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from helpers.exports_environment import exports_python
from helpers.tiny import run_tune, write_rows
from torchtune_kd._torchtune import recipe_registry
from torchtune_kd.config.reading import read_config
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError
from torchtune_kd.evaluation.candidates import load_candidate, sources_of
from torchtune_kd.evaluation.harness import LMEvalTask
from torchtune_kd.tools import prune_checkpoint

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'torchtune-kd[evaluate]'")
pytestmark = [pytest.mark.slow, pytest.mark.heavy]

# rows in the columns of each dataset; what they say is made up
HELLASWAG = [
    {"activity_label": "Baking", "ctx_a": f"A man puts {what} into a bowl.", "ctx_b": "he", "label": str(label),
     "endings": ["mixes it [title] with a spoon.", "swims to the shore.", "is a country.", "stirs."]}
    for label, what in enumerate(["flour", "sugar", "two eggs", "butter"])
]  # fmt: skip
COMMONSENSE = [
    {"question": f"Where do you find {what}?", "answerKey": key,
     "choices": {"label": list("ABCDE"), "text": ["river", "kitchen", "library", "sky", "garage"]}}
    for what, key in [("fish", "A"), ("a knife", "B"), ("many books", "C")]
]  # fmt: skip
TRUTHFUL = [
    {"question": question, "mc1_targets": {"choices": choices, "labels": labels},
     "mc2_targets": {"choices": choices, "labels": labels}}
    for question, choices, labels in [
        ("What is the largest planet?", ["Jupiter is.", "Jupiter", "The Moon.", "Mars is the largest"], [1, 1, 0, 0]),
        ("Can pigs fly?", ["No.", "Yes, they can.", "Only at night"], [1, 0, 0]),
    ]
]  # fmt: skip
LAMBADA = [{"text": "She opened the door and went into the house"}, {"text": "The king and his wife the queen"}]
WIKITEXT = [{"page": "The function returns a value . \n It raises an error , if there is none ."}, {"page": "A list."}]
TASKS = {  # lm-eval's own file, split, rows
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", HELLASWAG),
    "commonsense_qa": ("commonsense_qa/default.yaml", "validation", COMMONSENSE),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", "validation", TRUTHFUL),
    "lambada_openai": ("lambada/lambada_openai.yaml", "test", LAMBADA),
    "wikitext": ("wikitext/wikitext.yaml", "test", WIKITEXT),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """lm-eval's task files with data from this folder instead of the hub."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (file, split, rows) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        local = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / file),
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(data)}},
            **dict.fromkeys(("training_split", "validation_split", "test_split")),
            f"{split}_split": split,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(local))
    return folder


@pytest.fixture(scope="module")
def student(smollm2, tmp_path_factory):
    """Four layers of SmolLM2, trained for two steps by the recipe: its config, and the exported folder."""
    folder = tmp_path_factory.mktemp("student")
    prune_checkpoint(smollm2, folder / "pruned", [0, 1, 28, 29])
    write_rows(folder / "train.jsonl", ["The cat sat on the mat."] * 4)
    name = "torchtune_kd/smollm2/135M_to_15L_KD_full_single_device"
    (file,) = (
        config.file_path
        for recipe in recipe_registry().get_all_recipes()
        for config in recipe.configs
        if config.name == name
    )
    cfg = OmegaConf.load(file)
    more = {
        "output_dir": str(folder / "out"), "teacher_dir": str(smollm2), "student_dir": str(folder / "pruned"),
        "data_dir": str(folder), "model.num_layers": 4, "dtype": "fp32", "kd_ratio": 0.0,
    }  # fmt: skip
    for key, value in more.items():
        OmegaConf.update(cfg, key, value)
    del cfg["dataset_val"], cfg["run_val_every_n_steps"], cfg["max_val_batches"], cfg["batch_size_val"]
    run_tune(cfg, "torchtune_kd/kd_single_device")
    return cfg, folder / "out" / "epoch_0"


@pytest.fixture(scope="module")
def candidate(student):
    config = read_config(student[0], distributed=False)
    source = sources_of(config)["student"]
    return load_candidate(source, config.settings, World(torch.device("cpu"))), config.tokenizer.build()


def test_our_model_agrees_with_lm_evals_own(student, candidate, tasks, tmp_path):
    ours = {}
    for name in TASKS:
        measured, data = LMEvalTask(f"local_{name}", tasks).measure(*candidate, None, 3)
        ours[f"local_{name}"] = {one.metric: one.value for one in measured}
        assert f"local_{name}" in data and f"items {len(TASKS[name][2])}" in data
    script = Path(__file__).with_name("lm_eval_exports.py")
    names, theirs = list(ours), tmp_path / "theirs.json"
    prefix = candidate[1].eos_id  # SmolLM2 begins no text with an id; Hugging Face's config names one all the same
    command = [exports_python(), script, student[1], tasks, theirs, prefix, *names]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = json.loads(theirs.read_text())
    for name in names:
        metrics = {key: value for key, value in theirs[name].items() if not key.endswith("_stderr")}
        assert metrics and ours[name] == pytest.approx(metrics, rel=1e-4), name


def test_items_are_there_for_paired_comparisons(candidate, tasks):
    measured, _ = LMEvalTask("local_hellaswag", tasks).measure(*candidate, None, 3)
    acc = next(one for one in measured if one.metric == "acc")
    assert len(acc.items) == 4 and acc.value == sum(acc.items) / 4 and acc.se is not None


def test_a_task_that_writes_text(candidate, tmp_path):
    """Greedy text up to a stop word: what follows is not part of the answer."""
    (tmp_path / "rows.jsonl").write_text('{"question": "The cat sat on", "answer": "x"}\n')
    task = {
        "task": "local_writing", "dataset_path": "json", "output_type": "generate_until", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [" "], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    (tmp_path / "writing.yaml").write_text(yaml.safe_dump(task))
    measured, _ = LMEvalTask("local_writing", tmp_path).measure(*candidate, None, 1)
    assert [(one.metric, one.value) for one in measured] == [("exact_match", 0.0)]


def test_a_task_that_is_not_there_names_the_nearest(tasks):
    with pytest.raises(UserError, match=r"lm-eval has no task 'local_helaswag': did you mean `local_hellaswag`"):
        LMEvalTask("local_helaswag", tasks)


def test_a_task_whose_data_are_out_of_reach_is_one_sentence(candidate, tasks):
    (tasks / "wikitext.jsonl").unlink()
    with pytest.raises(UserError, match=r"The task lm_eval:local_wikitext cannot be run, make its data reachable"):
        LMEvalTask("local_wikitext", tasks).measure(*candidate, None, 1)
