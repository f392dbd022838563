"""The examples run as they stand, and what they claim holds."""

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny import ROWS, make_config, read_log

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def missing(*distributions):
    """Those that are not installed, by their metadata: a folder of the same name on the path does not count."""
    installed = {(dist.name or "").lower() for dist in metadata.distributions()}
    return [name for name in distributions if name not in installed]


needs_transformers = pytest.mark.skipif(
    bool(missing("transformers", "accelerate")), reason="transformers and accelerate are not installed"
)


def run(*command, **environment):
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_pytorch_comes_closer_to_the_teacher():
    lines = run(sys.executable, EXAMPLES / "plain_pytorch.py", "--device", "cpu", "--steps", "40").splitlines()
    numbers = [dict(zip(line.split()[::2], map(float, line.split()[1::2]), strict=True)) for line in lines]
    assert numbers[-1]["step"] == 39
    assert numbers[-1]["kl"] < 0.5 * numbers[0]["kl"]
    assert numbers[-1]["loss"] < numbers[0]["loss"]
    assert numbers[-1]["top1_agreement"] > 0.5 > numbers[0]["top1_agreement"]


@needs_transformers
def test_hugging_face_trainer_lowers_the_loss():
    losses = load("hugging_face_trainer").main(["--use-cpu", "--steps", "20"])
    assert losses[-1] < 0.9 * losses[0]


@pytest.fixture
def distillation(tmp_path):
    """The example's module and a trainer of its models; temperature and both parts of the loss in play."""
    example = load("hugging_face_trainer")
    settings = {"divergence": "forward_kl", "temperature": 2.0, "kd_ratio": 0.25}
    student, teacher = example.tiny_llama(32, 1), example.tiny_llama(64, 1, spread=0.2)
    rows = example.tiny_dataset(8)

    def trainer(**more):
        arguments = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "max_grad_norm": 0.0}
        arguments |= {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "disable_tqdm": True}
        return example.DistillationTrainer(
            model=example.LlamaForCausalLM(student.config),
            teacher=teacher,
            kd_settings=settings,
            args=example.TrainingArguments(str(tmp_path), **(arguments | more)),
            train_dataset=rows,
        )

    def trained(**more):
        one = trainer(**more)
        one.model.load_state_dict(student.state_dict())
        one.train()
        return dict(one.model.named_parameters())

    return trainer, trained


@needs_transformers
def test_hugging_face_loss_is_the_objective(distillation):
    """Against the formula in fp64 on the models' own logits, whose labels are shifted here by hand."""
    trainer = distillation[0]()
    rows = [trainer.train_dataset[i] for i in range(4)]
    inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs)
        per_step = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(1000))
        student, teacher = (m(inputs["input_ids"]).logits.double() for m in (trainer.model, trainer.teacher))
    labels = inputs["labels"][:, 1:]
    valid = labels != -100
    s, t = student[:, :-1][valid], teacher[:, :-1][valid]
    log_p, log_q = (t / 2).log_softmax(-1), (s / 2).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    truth = 0.75 * torch.nn.functional.cross_entropy(s, labels[valid], reduction="none") + 0.25 * 4 * kl
    assert loss.item() == pytest.approx(truth.mean().item(), rel=1e-5)
    assert per_step.item() == pytest.approx(truth.sum().item() / 1000, rel=1e-5)


@needs_transformers
def test_hugging_face_gradient_accumulation_takes_the_same_step(distillation):
    """Microbatches hold different numbers of valid tokens: a mean of their means would be another gradient."""
    _, trained = distillation
    whole = trained(per_device_train_batch_size=8)
    parts = trained(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
def test_stock_recipe_script(tmp_path):
    """torchtune's recipe with the script's two overrides, on models that fit a test."""
    cfg = make_config(tmp_path, "lora", rows=ROWS[4:8] * 3, optimizer__lr=1e-2)
    more = {
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 1,
        },
        "resume_from_checkpoint": False,
        "max_steps_per_epoch": 3,
        "gradient_accumulation_steps": 1,
        "compile": False,
        "enable_activation_checkpointing": False,
    }
    del cfg.kd_loss
    cfg.kd_ratio = 1.0
    OmegaConf.save(OmegaConf.merge(cfg, more), tmp_path / "tiny.yaml")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run(EXAMPLES / "stock_torchtune_recipe.sh", "seed=11", CONFIG=str(tmp_path / "tiny.yaml"), PATH=path)
    values = [step["kd_loss"] for step in read_log(cfg.output_dir)]
    assert values[0] == values[1] > values[2] > 0  # the first step of the warm-up has rate 0
