"""The benchmark of a teacher's head in 8-bit floats: its figures against fp64, on a tiny model."""

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config

from helpers.checkout import benchmarks
from helpers.tiny import TEACHER, VOCAB, model_section
from torchtune_kd.kernels import float8_weight

teacher_head = benchmarks("teacher_head")


@pytest.fixture
def model():
    torch.manual_seed(1)
    return config.instantiate(OmegaConf.create(model_section("full", TEACHER, tied=False))).requires_grad_(False)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_difference_is_the_kl_of_the_heads(temperature):
    hidden, weight, other = torch.randn(40, 16), torch.randn(50, 16), torch.randn(50, 16)
    p, q = ((hidden.double() @ head.double().t() / temperature).log_softmax(-1) for head in (weight, other))
    kl = (p.exp() * (p - q)).sum(-1)
    found = teacher_head.difference(hidden, weight, (hidden, other), temperature)
    assert found.mean == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found.largest == pytest.approx(kl.max().item(), rel=1e-5)
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    near = teacher_head.difference(hidden, weight, (hidden, float8_weight(weight)), temperature)
    assert 0 < near.mean < found.mean / 10


def test_a_change_is_that_of_the_gradients_autograd_gives(model):
    tokens = torch.randint(3, VOCAB, (2, 9))
    teacher = teacher_head.skip_output_head(model)(tokens)
    weight = model.output.weight.detach()
    heads = weight, weight + torch.randn_like(weight) / 10
    student = teacher_head.with_layers(model, [1])
    assert len(student.layers) == 1 and len(model.layers) == 2
    (found,) = teacher_head.changes(student, tokens, [(teacher, head) for head in heads], 2.0)
    grads = []
    for head in heads:
        hidden = student(tokens)
        p, q = ((x @ y.t() / 2).log_softmax(-1) for x, y in ((teacher, head), (hidden, student.output.weight)))
        loss = 4 * (p.exp() * (p - q)).sum()
        grads.append(torch.autograd.grad(loss, [hidden, *student.parameters()]))
    for index, value in ((slice(1), found.hidden), (slice(1, None), found.weights)):
        before, after = (torch.cat([g.flatten() for g in side[index]]) for side in grads)
        assert value == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-3)
    (none,) = teacher_head.changes(student, tokens, [(teacher, weight)] * 2, 2.0)
    assert none[1:] == (0.0, 0.0)


def test_every_line_is_printed(model):
    tokens, said = torch.randint(3, VOCAB, (2, 9)), []
    teacher_head.report(model.bfloat16(), tokens, [tokens], (1,), said.append)
    lines = [line for text in said for line in text.splitlines() if line]
    assert [line.split(",")[0] for line in lines[1:5]] == ["T = 1", "T = 1", "T = 2", "T = 2"]
    assert [line.split(",")[0] for line in lines[6:]] == ["T = 1", "T = 1", "T = 2", "T = 2"]
    assert not any("nan" in line for line in lines)
