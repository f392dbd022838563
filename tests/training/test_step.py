"""The gradient of one optimizer step against the objective written out in fp64 over full logits."""

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.functional import cross_entropy, log_softmax
from torchtune import config

from helpers.steps import accumulate
from helpers.tiny import STUDENT, TEACHER, VOCAB, model_section
from torchtune_kd.data.batches import Batch
from torchtune_kd.distributed.world import World
from torchtune_kd.losses import ForwardKLLoss, JSDLoss, ReverseKLLoss
from torchtune_kd.models.student import Student
from torchtune_kd.teachers.base import NoTeacher
from torchtune_kd.teachers.live import LiveTeacher
from torchtune_kd.training.step import gradient_norm

WORLD = World(torch.device("cpu"))
IGNORE = -100


def build(section: dict, seed: int):
    torch.manual_seed(seed)
    model = config.instantiate(OmegaConf.create(section))
    for parameter in model.parameters():  # LoRA's B starts at 0, which would hide A's gradient
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def make_batches(shapes: list[tuple[int, int]], valid: float) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    batches = []
    for batch, length in shapes:
        tokens = torch.randint(0, VOCAB, (batch, length), generator=generator)
        labels = torch.randint(0, VOCAB, (batch, length), generator=generator)
        labels[torch.rand(batch, length, generator=generator) >= valid] = IGNORE
        batches.append(Batch(tokens, labels))
    return batches


def divergence(kind, log_p, log_q):
    p, q = log_p.exp(), log_q.exp()
    if kind is ForwardKLLoss:
        return (p * (log_p - log_q)).sum(-1)
    if kind is ReverseKLLoss:
        return (q * (log_q - log_p)).sum(-1)
    m = 0.5 * (p + q)
    return 0.5 * (p * (log_p - m.log())).sum(-1) + 0.5 * (q * (log_q - m.log())).sum(-1)


def objective(student, teacher, batches, kind, kd_ratio, temperature):
    """L of the design page, over all tokens of all batches at once."""
    total, count = 0.0, 0
    for batch in batches:
        z_s, z_t = student(batch.tokens).double(), teacher(batch.tokens).double().detach()
        keep = batch.labels != IGNORE
        ce = cross_entropy(z_s[keep], batch.labels[keep], reduction="none")
        d = divergence(kind, log_softmax(z_t[keep] / temperature, -1), log_softmax(z_s[keep] / temperature, -1))
        total = total + ((1 - kd_ratio) * ce + kd_ratio * temperature**2 * d).sum()
        count += int(keep.sum())
    return total / count


@pytest.mark.parametrize("kind", [ForwardKLLoss, ReverseKLLoss, JSDLoss])
@pytest.mark.parametrize(("kd_ratio", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 0.5)])
@pytest.mark.parametrize("student_kind", ["full", "lora"])
def test_gradients_are_those_of_the_objective(kind, kd_ratio, temperature, student_kind):
    section = model_section(student_kind, STUDENT)
    oracle, ours = build(section, seed=1), build(section, seed=1)
    teacher_section = model_section("full", TEACHER, tied=False)
    oracle_teacher, our_teacher = build(teacher_section, seed=2), build(teacher_section, seed=2)
    batches = make_batches([(2, 9), (1, 17), (3, 4)], valid=0.6)

    expected = objective(oracle, oracle_teacher, batches, kind, kd_ratio, temperature)
    expected.backward()

    student = Student(ours, kind(temperature=temperature), kd_ratio)
    teacher = LiveTeacher(our_teacher) if kd_ratio > 0 else NoTeacher()
    sums = accumulate(student, teacher, batches, (), IGNORE, WORLD)

    assert sums["num_tokens"] == sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    assert (sums["loss"] / sums["num_tokens"]).item() == pytest.approx(expected.item(), rel=1e-5)
    # fp32 sums over hundreds of terms: compare with the size of the whole gradient of each weight
    for (name, weight), other in zip(oracle.named_parameters(), ours.parameters(), strict=True):
        scale = weight.grad.abs().max().clamp(min=1e-6)
        assert (other.grad - weight.grad).abs().max() <= 2e-5 * scale + 1e-7, name


def test_an_empty_microbatch_among_full_ones_changes_nothing():
    batches = make_batches([(2, 9), (1, 5)], valid=0.6)
    empty = Batch(torch.ones(2, 6, dtype=torch.long), torch.full((2, 6), IGNORE))
    norms = []
    for step in (batches, [batches[0], empty, batches[1]]):
        student = Student(build(model_section("full", STUDENT), seed=1), ForwardKLLoss(temperature=2.0), 0.5)
        teacher = LiveTeacher(build(model_section("full", TEACHER, tied=False), seed=2))
        accumulate(student, teacher, step, (), IGNORE, WORLD)
        norms.append(gradient_norm(list(student.parameters()), None).item())
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


def test_the_teacher_runs_before_the_student_and_without_a_graph():
    student = Student(build(model_section("full", STUDENT), seed=1), ForwardKLLoss(), 0.5)
    teacher = LiveTeacher(build(model_section("full", TEACHER, tied=False), seed=2))
    order = []
    teacher.register_forward_hook(lambda *_: order.append("teacher"))
    student.decoder.register_forward_pre_hook(lambda *_: order.append("student"))
    teacher.register_forward_hook(lambda module, args, output: order.append(output.requires_grad))
    accumulate(student, teacher, make_batches([(1, 4), (1, 4)], valid=1.0), (), IGNORE, WORLD)
    assert order == ["teacher", False, "student"] * 2
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_gradient_norm_clips_to_the_bound():
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([3.0, 0.0, 4.0])
    assert gradient_norm([weight], None) == 5
    assert weight.grad.tolist() == [3, 0, 4]
    assert gradient_norm([weight], 1.0) == 5
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.0, 0.8]))


def test_gradient_norm_of_bf16_gradients_is_summed_in_fp32():
    weights = [torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)) for _ in range(1000)]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1.0)
    assert gradient_norm(weights, None).item() == pytest.approx(1000**0.5, rel=1e-6)
