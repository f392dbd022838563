"""What a setting is said to save against two measured runs, without it and with it."""

from dataclasses import replace

import pytest
import torch
from torchtune.models.llama3_2 import llama3_2

from helpers.measured import measured_step, sized_config
from helpers.several import members, with_teachers
from helpers.tiny import make_config
from torchtune_kd.plan import Layout
from torchtune_kd.plan.advice import Case, Shape, advice, changes
from torchtune_kd.recipes.kd import KDRecipe
from torchtune_kd.training import read_config


def case_of(cfg, *, validation=False, layout=None):
    config = read_config(cfg, distributed=layout is not None)
    return Case(config, layout or Layout(), Shape(config.settings.batch_size, 128, validation=validation))


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("batch_size", {}),
        ("enable_activation_checkpointing", {}),
        ("dtype", {"dtype": "fp32"}),
        ("tokenizer.max_seq_len", {"batch_size": 1}),
    ],
)
def test_what_a_setting_saves_is_what_a_run_takes_less(tmp_path, kind, key, overrides):
    case = case_of(sized_config(tmp_path, 1, kind, **overrides))
    (change,) = [change for change in changes(case) if change.text.startswith(f"`{key}")]
    changed = change.of(case)
    predicted = max(case.phases().values()) - max(changed.phases().values())
    if key == "tokenizer.max_seq_len":
        changed.config.written.tokenizer.max_seq_len = changed.shape.sequence + 1  # torchtune cuts text to one less
    before, _ = measured_step(case.config.written, KDRecipe)
    after, _ = measured_step(changed.config.written, KDRecipe)
    assert predicted > 0
    assert predicted == pytest.approx(before - after, rel=0.1)


@pytest.mark.slow
def test_every_change_can_be_planned_and_names_what_it_changes(tmp_path):
    cfg = make_config(tmp_path, dtype="fp32")
    cfg.optimizer.fused = True
    cfg.model = {"_component_": "torchtune.models.llama3_2.llama3_2_1b"}
    cfg.teacher_model = {"_component_": "torchtune.models.llama3_2.llama3_2_1b"}
    for layout in (None, Layout(shards=2, sharded=True)):
        case = case_of(cfg, layout=layout)
        texts = []
        for change in changes(case):
            texts.append(change.text)
            read_config(change.of(case).config.written, distributed=layout is not None)
        more = "torchtune_kd/kd_distributed on two devices"
        more = more if layout is None else "4 processes that share the weights instead of 2"
        assert texts == [
            "`enable_activation_checkpointing: True`",
            "`batch_size: 2` with `gradient_accumulation_steps: 2`",
            "`dtype: bf16`",
            "`optimizer._component_: torchao.optim.AdamW8bit`",
            "`model._component_: torchtune.models.llama3_2.lora_llama3_2_1b` of rank 16",
            more,
        ]
    assert "lora_llama3_2_1b` of rank 16 saves" in advice(case_of(cfg), "optimizer")


def test_a_validation_is_planned_without_gradients(tmp_path):
    cfg = sized_config(tmp_path, 1, "full")
    training, validation = case_of(cfg), case_of(cfg, validation=True)
    assert validation.phases()["loss"] < training.phases()["loss"]
    said = advice(validation, "loss")
    assert "`batch_size_val: 2` saves" in said
    assert "activation" not in said and "gradient_accumulation_steps" not in said


@pytest.mark.heavy
def test_a_run_with_several_teachers_is_advised(tmp_path):
    cfg = sized_config(tmp_path, 12, "full")
    case = case_of(with_teachers(cfg, *(members(cfg)[name] for name in ("wide", "ema"))))
    assert "`batch_size: 2` with `gradient_accumulation_steps: 4` saves" in advice(case, "loss")
    assert "saves" in advice(case, "teacher")


def test_what_cannot_be_planned_is_said(tmp_path):
    case = case_of(make_config(tmp_path))
    case = replace(case, config=case.config.with_keys({"model._component_": "torch.nn.Linear"}))
    assert advice(case, "loss").startswith("what would help cannot be worked out (")


class Plain(torch.nn.Module):
    """A layer of one's own, which the plan cannot look into."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer


def custom_student(**sizes):
    model = llama3_2(**sizes)
    model.layers = torch.nn.ModuleList(map(Plain, model.layers))
    return model


def test_models_that_the_plan_does_not_know_do_not_hide_the_error(tmp_path):
    case = case_of(make_config(tmp_path))
    case = replace(case, config=case.config.with_keys({"model._component_": f"{__name__}.custom_student"}))
    assert "cannot be worked out (AttributeError: " in advice(case, "loss")
