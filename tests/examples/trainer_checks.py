"""What ``examples/hugging_face_trainer.py`` claims; ``test_examples.py`` runs this where transformers and peft are."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model


def load(name):
    path = Path(__file__).resolve().parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLE = load("hugging_face_trainer")


def test_hugging_face_trainer_lowers_the_loss():
    losses = EXAMPLE.main(["--use-cpu", "--steps", "20"])
    assert losses[-1] < 0.9 * losses[0]


@pytest.fixture
def distillation(tmp_path):
    """Make trainers of the example's models; temperature and both parts of the loss are in play."""
    settings = {"divergence": "forward_kl", "temperature": 2.0, "kd_ratio": 0.25}
    student, teacher = EXAMPLE.tiny_llama(32, 1), EXAMPLE.tiny_llama(64, 1, spread=0.2)
    rows = EXAMPLE.tiny_dataset(8)

    def trainer(**more):
        arguments = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "max_grad_norm": 0.0}
        arguments |= {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "disable_tqdm": True}
        return EXAMPLE.DistillationTrainer(
            model=EXAMPLE.LlamaForCausalLM(student.config),
            teacher=teacher,
            kd_settings=settings,
            args=EXAMPLE.TrainingArguments(str(tmp_path), **(arguments | more)),
            train_dataset=rows,
        )

    def trained(**more):
        one = trainer(**more)
        one.model.load_state_dict(student.state_dict())
        one.train()
        return dict(one.model.named_parameters())

    return trainer, trained


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


def test_hugging_face_gradient_accumulation_takes_the_same_step(distillation):
    """Microbatches hold different numbers of valid tokens: a mean of their means would be another gradient."""
    _, trained = distillation
    whole = trained(per_device_train_batch_size=8)
    parts = trained(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=0, atol=1e-6, msg=name)


SIZES = {
    "vocab_size": EXAMPLE.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def model_of(family, **more):
    """A tiny model with random weights, biases included, all of which published models have trained."""
    config = getattr(transformers, f"{family}Config")(**SIZES, **more)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def lora(model, *modules, trained=False, **more):
    adapted = get_peft_model(model, LoraConfig(target_modules=list(modules), task_type="CAUSAL_LM", **more))
    if trained:
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    return adapted


WRONG = {  # heads whose logits are not the product that the loss computes
    "Gemma 2, soft cap": lambda: model_of("Gemma2", head_dim=8, final_logit_softcapping=30.0),
    "Granite, scale": lambda: model_of("Granite", logits_scaling=8.0),
    "Cohere, scale": lambda: model_of("Cohere", logit_scale=0.0625),
    "an adapter on the head": lambda: lora(EXAMPLE.tiny_llama(32, 1), "q_proj", "lm_head", trained=True),
}
RIGHT = {
    "Gemma 2, no soft cap": lambda: model_of("Gemma2", head_dim=8, final_logit_softcapping=None),
    "Granite, scale 1": lambda: model_of("Granite", logits_scaling=1.0),
    "Phi, bias": lambda: model_of("Phi"),
    "Qwen 2, tied": lambda: model_of("Qwen2", tie_word_embeddings=True),
    "adapters elsewhere": lambda: lora(EXAMPLE.tiny_llama(32, 1), "q_proj", trained=True),
    "a head that peft trains whole": lambda: lora(EXAMPLE.tiny_llama(32, 1), "q_proj", modules_to_save=["lm_head"]),
}


def batch(length=24):
    rows = EXAMPLE.tiny_dataset(2, length)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture
def trainer_of(tmp_path):
    def made(student, teacher, **more):
        arguments = {"max_steps": 2, "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
        return EXAMPLE.DistillationTrainer(
            model=student,
            teacher=teacher,
            kd_settings={"kd_ratio": 0.5},
            args=EXAMPLE.TrainingArguments(str(tmp_path), **(arguments | more)),
            train_dataset=EXAMPLE.tiny_dataset(8),
        )

    return made


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_refuses_a_head_that_is_no_linear_layer(trainer_of, kind, name):
    models = {"student": EXAMPLE.tiny_llama(32, 1), "teacher": EXAMPLE.tiny_llama(32, 1)} | {name: WRONG[kind]()}
    trainer = trainer_of(**models)
    with pytest.raises(ValueError, match=f"of the {name} to .*softmax_kd_loss") as raised:
        trainer.compute_loss(trainer.model, batch())
    assert str(raised.value).count(". ") == 0


def test_refuses_an_adapter_on_the_head_before_its_first_step(trainer_of):
    """Its product is still 0, so that no logit differs yet."""
    trainer = trainer_of(lora(EXAMPLE.tiny_llama(32, 1), "q_proj", "lm_head"), EXAMPLE.tiny_llama(32, 1))
    with pytest.raises(ValueError, match="head of the student to train a weight and a bias alone"):
        trainer.compute_loss(trainer.model, batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", RIGHT)
def test_takes_the_logits_of_the_model(trainer_of, kind, dtype):
    """As student and teacher; the loss is that of the models' own logits, and the check changes neither of them."""
    torch.manual_seed(1)
    trainer = trainer_of(RIGHT[kind]().to(dtype), RIGHT[kind]().to(dtype))
    trainer.model.train()
    modes = [module.training for module in trainer.model.modules()]
    inputs = batch()
    loss = trainer.compute_loss(trainer.model, inputs)
    assert [module.training for module in trainer.model.modules()] == modes
    assert not trainer.teacher.get_output_embeddings()._forward_pre_hooks
    trainer.model.eval()
    with torch.no_grad():
        student, teacher = (m(inputs["input_ids"]).logits.double() for m in (trainer.model, trainer.teacher))
    labels = inputs["labels"][:, 1:]
    valid = labels != -100
    s, t = student[:, :-1][valid], teacher[:, :-1][valid]
    log_p, log_q = t.log_softmax(-1), s.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    ce = torch.nn.functional.cross_entropy(s, labels[valid], reduction="none")
    truth = 0.5 * ce.mean() + 0.5 * kl.mean()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5 if dtype == torch.float32 else 0.01)


def test_mixed_precision_is_no_other_head(trainer_of):
    """The student's logits are then rounded to bf16 while its hidden states and weights are fp32."""
    trainer_of(EXAMPLE.tiny_llama(32, 1), EXAMPLE.tiny_llama(32, 1), bf16=True).train()


def test_heads_are_checked_once(trainer_of, monkeypatch):
    checked = []
    monkeypatch.setattr(EXAMPLE, "check_output_head", lambda model, name, *_, **__: checked.append(name))
    trainer_of(EXAMPLE.tiny_llama(32, 1), EXAMPLE.tiny_llama(32, 1)).train()
    assert checked == ["student", "teacher"]
