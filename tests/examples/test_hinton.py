"""``examples/hinton``: its images, networks, biases and specialists, and with two seeds the signs of its effects."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.hinton import load

pytest.importorskip("sklearn", reason="the extra evidence is not installed")
digits, networks, experiments, specialists = map(load, ("digits", "networks", "experiments", "specialists"))


def small_splits(seeds=2, images=30, classes=10):
    """Random images; every class is there."""
    labels = torch.arange(images).remainder(classes).expand(seeds, -1).contiguous()
    return digits.Splits(torch.rand(seeds, images, 64), labels, torch.rand(seeds, images, 64), labels.flip(1))


# ------------------------------------------------------------------------------------------------ images


def test_splits_are_the_digits_divided():
    splits = digits.load_splits(2)
    assert splits.images.shape == (2, 1197, 64) and splits.test_images.shape == (2, 600, 64)
    assert splits.images.max() == 1
    both = torch.cat([splits.images, splits.test_images], 1)
    assert not torch.equal(both[0], both[1])
    whole = [sorted(map(tuple, split.tolist())) for split in both]
    assert whole[0] == whole[1] and len(whole[0]) == 1797
    longer = digits.load_splits(3)  # a seed's split does not depend on how many there are
    assert torch.equal(longer.test_images[:2], splits.test_images)
    assert torch.equal(longer.labels[:2], splits.labels)


def test_an_image_is_shifted_by_up_to_one_pixel():
    image = torch.rand(8, 8)
    shifted = digits.shift_at_random(image.flatten().expand(400, -1))
    framed = F.pad(image, (1, 1, 1, 1))
    expected = {tuple(framed[y : y + 8, x : x + 8].flatten().tolist()) for y in range(3) for x in range(3)}
    assert {tuple(each.tolist()) for each in shifted} == expected


def test_rotations_make_forty_classes():
    splits = small_splits(seeds=3)
    turned = digits.in_four_rotations(splits, 2)
    assert turned.images.shape == (2, 120, 64) and turned.test_labels.shape == (2, 120)
    for quarter in range(4):
        part = slice(30 * quarter, 30 * (quarter + 1))
        assert torch.equal(turned.labels[:, part], splits.labels[:2] + 10 * quarter)
        upright = turned.images[1, part.start + 4].view(8, 8).rot90(-quarter)
        assert torch.equal(upright.flatten(), splits.images[1, 4])


# ------------------------------------------------------------------------------------------------ networks


@dataclass(frozen=True)
class Recording(networks.Targets):
    """Remembers which images were drawn."""

    drawn: list = field(default_factory=list)

    def loss(self, logits, rows):
        self.drawn.append(rows)
        return super().loss(logits, rows)


@pytest.mark.parametrize("soft", [False, True])
def test_networks_trained_together_are_those_trained_alone(soft):
    """Against plain PyTorch: linear layers, Adam, cross-entropy, and T² times the divergence at temperature T."""
    count, steps, widths = 3, 6, (64, 20, 20, 10)
    splits = small_splits(count)
    teacher = 3 * torch.randn(count, 30, 10) if soft else None
    targets = Recording(splits.labels, teacher, temperature=3.0)
    together = networks.Networks(count, widths)
    alone = [
        nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 10)) for _ in "abc"
    ]
    for each, network in enumerate(alone):
        for layer, weight, bias in zip(network[::2], together.weights, together.biases, strict=True):
            layer.weight.data, layer.bias.data = weight[each].detach().T.clone(), bias[each, 0].detach().clone()
    networks.train(together, splits.images, targets, experiments.all_images(splits), steps)

    assert len(targets.drawn) == steps
    for each, network in enumerate(alone):
        optimizer = torch.optim.Adam(network.parameters(), networks.LEARNING_RATE)
        for step, drawn in enumerate(targets.drawn):
            optimizer.param_groups[0]["lr"] = networks.LEARNING_RATE * (1 - step / steps)
            rows = drawn[each]
            logits = network(splits.images[each, rows])
            if soft:
                log_q, log_p = ((z / 3).log_softmax(-1) for z in (logits, teacher[each, rows]))
                loss = 9 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
            else:
                loss = F.cross_entropy(logits, splits.labels[each, rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        predicted = together.predict(splits.test_images)[each]
        torch.testing.assert_close(predicted, network(splits.test_images[each]), rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_sum_of_each_networks_mean():
    """Adam divides by the gradient's size, so that training alone would not notice a factor."""
    labels, teacher = small_splits().labels, 3 * torch.randn(2, 30, 10)
    logits, rows = torch.randn(2, 12, 10), torch.randint(30, (2, 12))
    picked = torch.stack([teacher[each, rows[each]] for each in range(2)])
    log_q, log_p = (logits / 4).log_softmax(-1).double(), (picked / 4).log_softmax(-1).double()
    soft = 16 * (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1).sum()
    hard = sum(F.cross_entropy(logits[each].double(), labels[each, rows[each]]) for each in range(2))
    assert networks.Targets(labels, teacher, 4.0).loss(logits, rows).item() == pytest.approx(soft.item(), rel=1e-5)
    assert networks.Targets(labels).loss(logits, rows).item() == pytest.approx(hard.item(), rel=1e-5)


def test_images_without_a_share_are_never_drawn():
    splits = small_splits()
    share = experiments.all_images(splits)
    share[0, 4:] = 0
    targets = Recording(splits.labels)
    networks.train(networks.Networks(2, (64, 10)), splits.images, targets, share, 3)
    drawn = torch.stack(targets.drawn)
    assert drawn[:, 0].max() == 3 and drawn[:, 1].max() == 29


def test_dropout_is_for_training_alone():
    each = networks.Networks(2, (64, 50, 10), dropout=0.5)
    images = torch.rand(2, 5, 64)
    assert torch.equal(each.predict(images), each.predict(images))
    each.train()
    assert not torch.equal(each(images), each(images))


# ------------------------------------------------------------------------------------------------ bias, ensemble


def test_the_middle_of_the_best_biases_is_chosen():
    """A three needs more than 2, a five less than 4."""
    logits = torch.zeros(1, 2, 10)
    logits[0, 0, 8], logits[0, 1, 5] = 2, 4
    labels = torch.tensor([[3, 5]])
    assert experiments.chosen_bias(logits, labels, (3,)).item() == pytest.approx(3, abs=0.25)
    # without threes nothing is won by raising them
    assert experiments.chosen_bias(logits, torch.tensor([[8, 5]]), (3,)).item() == pytest.approx(1, abs=0.25)


def test_the_bias_is_chosen_without_the_test_images(monkeypatch):
    splits = small_splits(images=200)
    student = networks.Networks(2, (64, 10))
    monkeypatch.setattr(experiments, "trained_student", lambda *_: student)
    others = digits.Splits(splits.images, splits.labels, torch.rand(2, 50, 64), torch.randint(10, (2, 50)))
    one, other = (
        experiments._students_omitting(each, networks.Targets(each.labels), (3,)) for each in (splits, others)
    )
    assert torch.equal(one["bias"], other["bias"])
    assert not torch.equal(one[experiments.ERROR_RAISED], other[experiments.ERROR_RAISED])


def test_the_ensemble_is_the_mean_of_its_members_at_each_temperature():
    logits = 3 * torch.randn(2, 5, 7, 10)
    for t in (1, 4):
        mean = (logits / t).softmax(-1).mean(1)
        torch.testing.assert_close((experiments.averaged(logits, t) / t).softmax(-1), mean)


# ------------------------------------------------------------------------------------------------ specialists


def test_a_specialist_is_combined_as_a_direct_search_has_it():
    """The q that minimises the sum of both divergences, sought by its logits in fp64."""
    p, answer = torch.randn(6, 7).double().softmax(-1), torch.randn(6, 8).double()
    own = torch.rand(6, 7) < 0.5
    own[:, 0], own[:, 1] = True, False
    answer[:, :-1][~own] = -math.inf
    answer = answer.softmax(-1)
    logits = torch.zeros(6, 7, dtype=torch.double, requires_grad=True)

    def divergence(q):
        dustbin = q.where(~own, 0).sum(-1, keepdim=True)
        seen = torch.cat([q.where(own, 1), dustbin], -1)  # of a class outside the answer says 0: 0 · log 1
        return (p * (p / q).log()).sum() + (torch.special.xlogy(answer, answer) - answer * seen.log()).sum()

    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = divergence(logits.softmax(-1))
        loss.backward()
        return loss

    optimizer.step(closure)
    q = specialists.combined(p, answer, own)
    torch.testing.assert_close(q.sum(-1), torch.ones(6).double())
    torch.testing.assert_close(q, logits.detach().softmax(-1), rtol=0, atol=1e-5)
    assert divergence(q) <= divergence(logits.detach().softmax(-1)) + 1e-9


def test_specialists_begin_as_their_generalist_and_know_how_often_the_dustbin_occurs():
    splits = digits.in_four_rotations(small_splits(images=50), 2)
    generalist = networks.Networks(2, (*specialists.HIDDEN, 40))
    groups = torch.stack([torch.arange(40) % 8, torch.arange(40) // 5])
    special = specialists.trained_specialists(generalist, groups, splits, steps=0)
    logits = special.predict(splits.test_images.repeat_interleave(8, 0)).unflatten(0, (2, 8))
    known = generalist.predict(splits.test_images)
    for seed in range(2):
        for s in range(8):
            own = groups[seed] == s
            torch.testing.assert_close(logits[seed, s][:, :-1][:, own], known[seed][:, own])
            assert logits[seed, s].softmax(-1)[:, :-1][:, ~own].max() == 0
    # 5 of 40 classes with as many images each: the dustbin occurs 7 times as often as it is drawn
    torch.testing.assert_close(logits[..., -1], torch.full_like(logits[..., -1], math.log(7)))


def test_the_specialist_of_the_likeliest_class_is_asked(monkeypatch):
    groups = torch.stack([torch.arange(40) % 8, torch.arange(40) // 5])
    p = torch.randn(2, 9, 40).softmax(-1)
    answers = torch.randn(16, 9, 41).log_softmax(-1)  # as logits, of S·P networks
    special = networks.Networks(16, (64, 41))
    monkeypatch.setattr(special, "predict", lambda images: answers)
    answer, own = specialists.answers(p, special, groups, torch.rand(2, 9, 64))
    for seed in range(2):
        for image in range(9):
            s = groups[seed, p[seed, image].argmax()]
            torch.testing.assert_close(answer[seed, image], answers[8 * seed + s, image].exp())
            assert torch.equal(own[seed, image], groups[seed] == s)


def test_a_student_of_generalist_and_specialist_ends_where_both_are_combined():
    """There the gradient by its logits is 0, which it is not where the generalist alone would lead."""
    p, own = torch.randn(2, 9, 6).double().softmax(-1), torch.rand(2, 9, 6) < 0.5
    own[..., 0], own[..., 1] = True, False
    answer = torch.randn(2, 9, 7).double()
    answer[..., :-1][~own] = -math.inf
    answer = answer.softmax(-1)
    rows, labels = torch.arange(9).expand(2, -1), torch.zeros(2, 9, dtype=torch.long)
    targets = specialists.SpecialistTargets(labels, p.log(), answer=answer, own=own)
    gradients = []
    for q in (specialists.combined(p, answer, own), p):
        logits = q.log().requires_grad_()
        targets.loss(logits, rows).backward()
        gradients.append(logits.grad.abs().max().item())
    assert gradients[0] < 1e-12 < 1e-3 < gradients[1]


def test_classes_that_are_predicted_together_share_a_specialist():
    """Pairs of classes that take each other's probability: classes 2i and 2i + 1."""
    pairs = torch.rand(500, 20).pow(8)
    split = torch.rand(500, 20)
    p = torch.stack([pairs * split, pairs * (1 - split)], -1).flatten(1) + 2 * pairs.repeat_interleave(2, 1)
    groups = specialists.confusable_groups(20 * p.log())
    assert torch.equal(groups[::2], groups[1::2])
    assert groups.unique().tolist() == list(range(8))


# ------------------------------------------------------------------------------------------------ effects


@pytest.mark.slow
@pytest.mark.nightly
def test_effects_have_the_signs_of_the_paper():
    """With two seeds: the sure teacher at T = 4, few data, and classes that were left out."""
    splits = digits.load_splits(2)
    sure = experiments.temperature(splits, teachers=("sure",), temperatures=(4,), units=(100,))
    few = experiments.few_data(splits, percentages=(10,), temperatures=(4,))
    claims = [*sure.claims, *few.claims]
    few_beats = "with 10 % of the images soft targets at T = 4 beat hard labels"
    assert [claim.text for claim in claims] == [
        "soft targets of the sure teacher at T = 4 beat hard labels",
        few_beats,
        f"{few_beats} that stop at their best step on the test images",
    ]
    assert [claim.sentence() for claim in claims if claim.values.mean() * claim.expected <= 0] == []

    for table in experiments.omitted(splits, temperatures=(4,)).tables:
        hard, soft = table.rows["hard"], table.rows["soft, T = 4"]
        assert hard[experiments.FOUND].max() == 0  # a class without an example is never predicted
        assert soft[experiments.FOUND].min() > 0
        assert soft[experiments.ERROR].mean() < hard[experiments.ERROR].mean()
        assert soft[experiments.FOUND_RAISED].mean() > soft[experiments.FOUND].mean()
