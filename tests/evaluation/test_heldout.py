"""Held-out text: means over tokens, items by row, errors clustered by row."""

import math

import pytest
import torch
import torch.nn.functional as F

from helpers.tiny import VOCAB
from torchtune_kd.data.batches import Batch
from torchtune_kd.evaluation.heldout import measure_text, text_fingerprint


def batches(batch_size):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (5, 12), generator=generator)
    labels = torch.cat([tokens[:, 1:], torch.full((5, 1), -100)], 1)
    labels[2, 4:] = -100  # a shorter row
    labels[3] = -100  # a row without a valid token is no item
    return [Batch(*pair) for pair in zip(tokens.split(batch_size), labels.split(batch_size), strict=True)]


def rows(student, teacher):
    """Per row with valid tokens, in fp64: number of tokens and means of loss, entropy, KL, agreement, acceptance."""
    for batch in batches(1):
        valid = batch.labels[0] != -100
        if not valid.any():
            continue
        log_q, log_p = (
            F.linear(model.states(batch.tokens)[0, valid].double(), model.head[0].double()).log_softmax(-1)
            for model in (student, teacher)
        )
        q, p = log_q.exp(), log_p.exp()
        yield [
            int(valid.sum()),
            float(-log_q.gather(-1, batch.labels[0, valid][:, None]).mean()),
            float(-(q * log_q).sum(-1).mean()),
            float((p * (log_p - log_q)).sum(-1).mean()),
            float((q.argmax(-1) == p.argmax(-1)).double().mean()),
            float(torch.minimum(p, q).sum(-1).mean()),
        ]


def test_every_metric_is_what_its_formula_says(candidates):
    student, teacher = candidates["untrained"], candidates["teacher"]
    found = {one.metric: one for one in measure_text(student, teacher, batches(2))}
    expected = torch.tensor(list(rows(student, teacher)), dtype=torch.float64)
    weights = expected[:, 0]
    for index, name in enumerate(("loss", "entropy", "kl", "top1_agreement", "acceptance_rate"), start=1):
        one, items = found[name], expected[:, index]
        assert one.weights == weights.tolist() and one.n == 4
        assert one.items == pytest.approx(items.tolist(), rel=1e-5, abs=1e-6), name
        mean = (weights * items).sum() / weights.sum()
        assert one.value == pytest.approx(float(mean), rel=1e-5, abs=1e-6)
        spread = ((weights * (items - mean)) ** 2).sum() * 4 / 3  # clustered by row
        assert one.se == pytest.approx(float(spread.sqrt() / weights.sum()), rel=1e-4, abs=1e-6)


def test_perplexity_is_exp_of_the_loss_with_its_error(candidates):
    found = {one.metric: one for one in measure_text(candidates["teacher"], None, batches(2))}
    loss, perplexity = found["loss"], found["perplexity"]
    assert perplexity.value == pytest.approx(math.exp(loss.value))
    assert perplexity.se == pytest.approx(perplexity.value * loss.se)
    assert set(found) == {"loss", "entropy", "perplexity"}  # no reference, no distances


def test_a_model_is_at_no_distance_from_itself(candidates):
    found = {one.metric: one for one in measure_text(candidates["teacher"], candidates["teacher"], batches(2))}
    assert found["kl"].value == 0 and found["top1_agreement"].value == 1
    assert found["acceptance_rate"].value == pytest.approx(1)


def test_batches_change_nothing(candidates):
    one, other = (measure_text(candidates["untrained"], candidates["teacher"], batches(size)) for size in (1, 3))
    for a, b in zip(one, other, strict=True):
        assert a.items is None or a.items == pytest.approx(b.items, rel=1e-4, abs=1e-6)
    assert text_fingerprint(batches(1)) == text_fingerprint(batches(3))


def test_another_text_has_another_fingerprint():
    whole = batches(5)
    changed = whole[0].tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % VOCAB
    assert text_fingerprint([Batch(changed, whole[0].labels)]) != text_fingerprint(whole)
    assert text_fingerprint([Batch(whole[0].tokens, whole[0].labels.clone().fill_(-100))]) != text_fingerprint(whole)
    labels = whole[0].labels.clone()
    labels[:, :3] = -100
    prompts = [text_fingerprint([Batch(tokens, labels)]) for tokens in (whole[0].tokens, changed)]
    assert prompts[0] != prompts[1]  # a masked prompt is read all the same
