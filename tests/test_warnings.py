"""Our programs speak first: two known warnings of torchao and PyTorch are silent there, and no other is."""

import logging
import os
import subprocess
import sys
import warnings

import pytest
from omegaconf import OmegaConf

from helpers.tiny import make_config
from torchtune_kd import _warnings

BIN = os.path.dirname(sys.executable)
PLAN = ["torchtune_kd/plan", "--config", "torchtune_kd/llama3_2/8B_to_1B_KD_lora_single_device"]
PYTORCH = (
    "Mismatch dtype between input and weight: input dtype = float, weight dtype = c10::BFloat16, Cannot dispatch to "
    "fused implementation. (Triggered internally at layer_norm.cpp:346.)"
)
TORCHAO = "Skipping import of cpp extensions due to incompatible torch version 2.13.0 for torchao version 0.15.0"


def lines(command, cwd, code=0, **environment):
    """Everything that a program prints, on stdout and stderr, as a user sees it."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout
    return done.stdout.splitlines()


@pytest.mark.heavy
@pytest.mark.parametrize(
    "command, environment",
    [
        ([f"{BIN}/tune", "run"], {}),
        ([sys.executable, "-m", "torchtune_kd", "run"], {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}),
    ],
    ids=["tune", "without plug-ins"],
)
def test_plan_says_nothing_before_its_first_line(tmp_path, command, environment):
    printed = lines([*command, *PLAN], tmp_path, **environment)
    assert printed[0] == "Computed from the config alone: nothing is loaded, trained or measured."
    assert not any("cpp extensions" in line or "Mismatch dtype" in line for line in printed)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "command, first",
    [
        (["torchtune_kd.tools.gguf", "nope", "out"], "error: Expected a GGUF file"),
        (
            [
                "torchtune_kd.tools.prune",
                "--checkpoint-dir=no",
                "--output-dir=out",
                "--num-layers=1",
                "--strategy=even",
            ],
            "error: ",
        ),
        (["torchtune_kd.demo", "--temperature", "-1"], "error: Expected a --temperature"),
    ],
    ids=["gguf", "prune", "demo"],
)
def test_modules_say_their_sentence_alone(tmp_path, command, first):
    (line,) = lines([sys.executable, "-m", *command], tmp_path, code=2)
    assert line.startswith(first)


# A dataset of a user's own, which warns in each of the ways that ours are warned of.
WARNING_DATASET = """
import logging, warnings
from torchtune.datasets import text_completion_dataset

def dataset(tokenizer, **more):
    logging.getLogger("torchao").warning("another sentence of torchao")
    warnings.warn("a user's own warning")
    warnings.warn_explicit("another warning of PyTorch", UserWarning, "functional.py", 1, "torch.nn.functional")
    warnings.warn_explicit("Mismatch dtype between mine", UserWarning, "mine.py", 1, "mine")
    return text_completion_dataset(tokenizer, **more)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_begins_with_its_own_line_and_every_other_warning_appears(tmp_path, processes):
    (tmp_path / "mine.py").write_text(WARNING_DATASET)
    cfg = make_config(tmp_path, dtype="bf16", max_steps_per_epoch=1)
    cfg.dataset._component_ = "mine.dataset"
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    recipe, several = "torchtune_kd/kd_single_device", []
    if processes > 1:
        recipe, several = "torchtune_kd/kd_distributed", ["--nproc_per_node", str(processes)]
    command = [f"{BIN}/tune", "run", *several, recipe, "--config", "config.yaml"]
    printed = lines(command, tmp_path, PYTHONPATH=str(tmp_path), OMP_NUM_THREADS="1")
    if several:
        assert printed.pop(0) == "Running with torchrun..."
    assert printed[0].endswith("with resolved config:")
    text = "\n".join(printed)
    assert "cpp extensions" not in text and "weight dtype = c10::BFloat16" not in text
    for other in ("another sentence of torchao", "a user's own warning", "another warning of PyTorch", "between mine"):
        assert other in text


@pytest.fixture
def fresh(monkeypatch):
    """Silencing as in a new process, undone afterwards."""
    logger = logging.getLogger("torchao")
    monkeypatch.setattr(logger, "filters", [])
    _warnings.silence_known_warnings.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield logger
    _warnings.silence_known_warnings.cache_clear()


def warned_and_logged(logger, caplog, module, *sentences):
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.WARNING):
        for sentence in sentences:
            warnings.warn_explicit(sentence, UserWarning, "file.py", 1, module)
            logger.warning(sentence)
    return [str(one.message) for one in warned], [record.getMessage() for record in caplog.records]


def test_only_these_two_are_silent(fresh, caplog, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "/bin/tune", "run", *PLAN])
    _warnings.silence_known_warnings()
    sentences = (PYTORCH, TORCHAO, "another")
    assert warned_and_logged(fresh, caplog, "torch.nn.functional", *sentences) == (
        [TORCHAO, "another"],
        [PYTORCH, "another"],
    )
    assert warned_and_logged(fresh, caplog, "users.module", PYTORCH)[0] == [PYTORCH]


def test_a_program_of_the_users_is_left_as_it_is(fresh, caplog, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "torchtune_kd"])
    _warnings.silence_known_warnings()
    sentences = [PYTORCH, TORCHAO]
    assert warned_and_logged(fresh, caplog, "torch.nn.functional", *sentences) == (sentences, sentences)


@pytest.mark.parametrize(
    "command, ours",
    [
        ("python /bin/tune run torchtune_kd/kd_single_device --config my.yaml", True),
        ("python /bin/tune run --nproc_per_node 2 torchtune_kd/kd_distributed --config my.yaml", True),
        ("python -u /site/torchtune_kd/recipes/kd.py --config my.yaml", True),
        ("python -m torchtune_kd run torchtune_kd/plan --config my.yaml", True),
        ("python -m torchtune_kd.tools.prune --help", True),
        ("python -m torchtune_kd ls", True),
        ("python /bin/tune run full_finetune_single_device --config my.yaml", False),
        ("python /bin/tune run knowledge_distillation_single_device --config torchtune_kd/x", False),
        ("python -m pytest tests/torchtune_kd.py", False),
        ("python train.py", False),
        ("python", False),
    ],
)
def test_what_is_one_of_our_programs(command, ours):
    assert _warnings.is_our_program(command.split()) is ours
