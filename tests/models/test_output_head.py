"""The two sides of the output head, for every kind of head that torchtune builds."""

import pytest
import torch
from omegaconf import OmegaConf
from torchao.quantization.qat.linear import FakeQuantizedLinear
from torchtune import config
from torchtune.modules.peft.lora import QATLoRALinear

from helpers.tiny import LORA, STUDENT, VOCAB, model_section
from torchtune_kd.models.output_head import output_head, skip_output_head


def build(section: dict):
    torch.manual_seed(1)
    return config.instantiate(OmegaConf.create(section))


def lora_head(kind: str) -> dict:
    """A model with an adapter on its head; Llama 3's builder, because its head is not tied."""
    section = model_section(kind, STUDENT, apply_lora_to_output=True)
    section["_component_"] = "torchtune.models.llama3.lora_llama3"
    del section["scale_factor"], section["tie_word_embeddings"]
    return section


@pytest.mark.parametrize("kind", ["linear", "tied", "lora", "dora", "qlora"])
def test_weight_and_bias_give_the_logits_of_the_head(kind):
    adapted = kind in ("lora", "dora", "qlora")
    model = build(lora_head(kind) if adapted else model_section("full", STUDENT, tied=kind == "tied"))
    if adapted:
        torch.nn.init.normal_(model.output.lora_b.weight, std=0.05)
    if kind == "dora":
        torch.nn.init.uniform_(model.output.magnitude, 0.5, 2.0)
    hidden = torch.randn(5, STUDENT["embed_dim"])
    weight, bias = output_head(model)
    torch.testing.assert_close(torch.nn.functional.linear(hidden, weight, bias), model.output(hidden))


def test_a_gradient_of_the_weight_reaches_the_adapter():
    model = build(lora_head("lora"))
    torch.nn.init.normal_(model.output.lora_b.weight, std=0.05)
    weight, _ = output_head(model)
    weight.sum().backward()
    a, b = model.output.lora_a.weight, model.output.lora_b.weight
    scale = LORA["lora_alpha"] / LORA["lora_rank"]
    torch.testing.assert_close(a.grad, scale * b.sum(0)[:, None].expand_as(a))
    torch.testing.assert_close(b.grad, scale * a.sum(1)[None].expand_as(b))


def test_an_adapter_with_dropout_has_no_single_weight():
    with pytest.raises(ValueError, match=r"lora_dropout=0\.0.*0\.1"):
        output_head(build(lora_head("lora") | {"lora_dropout": 0.1}))


def test_another_kind_of_head_is_named():
    model = build(model_section("full", STUDENT, tied=False))
    model.output = torch.nn.Identity()
    with pytest.raises(ValueError, match="Identity"):
        output_head(model)


@pytest.mark.parametrize(
    "head",
    [FakeQuantizedLinear(STUDENT["embed_dim"], VOCAB), QATLoRALinear(STUDENT["embed_dim"], VOCAB, rank=4, alpha=8)],
    ids=lambda head: type(head).__name__,
)
def test_a_head_that_may_quantise_its_weight_first_is_refused(head):
    """Its weight is not the map that it computes, though it is an nn.Linear or a LoRALinear."""
    model = build(model_section("full", STUDENT, tied=False))
    model.output = head
    with pytest.raises(ValueError, match=f"got {type(head).__name__}.*quantisation-aware"):
        output_head(model)


def test_skip_output_head_returns_what_the_head_reads_and_renames_nothing():
    section = model_section("full", STUDENT, tied=False)
    model, skipped = build(section), skip_output_head(build(section))
    tokens = torch.arange(12).view(2, 6)
    torch.testing.assert_close(skipped.output(skipped(tokens)), model(tokens))
    assert skipped.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="Linear"):
        skip_output_head(torch.nn.Linear(2, 2))
