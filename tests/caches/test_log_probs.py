"""Stored log-probabilities, against NumPy in fp64."""

import numpy as np
import pytest
import torch

from torchtune_kd.caches.log_probs import bytes_per_token, encode_sampled, encode_top_k, trimmed

M, V, K = 12, 50, 5
TEMPERATURES = (0.5, 1.0, 3.0)


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return 3 * torch.randn(M, V)


def log_softmax(logits):
    z = logits.double().numpy()
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def test_the_likeliest_ids_the_label_and_the_tails(logits):
    labels = torch.arange(M)
    labels[0] = logits[0].argmax()  # is among them
    labels[1] = -1  # the last token of a document
    columns = encode_top_k(logits, labels, K, TEMPERATURES)
    log_p = log_softmax(logits)
    assert [columns[name].dtype for name in ("ids", "log_probs", "tail")] == [torch.int32, torch.float16, torch.float32]
    for row in range(M):
        top = np.argsort(-log_p[row])[:K]
        assert columns["ids"][row, :K].tolist() == top.tolist()
        extra = -1 if int(labels[row]) in {*top, -1} else int(labels[row])
        assert columns["ids"][row, K] == extra
        stored = [*top] + ([extra] if extra >= 0 else [])
        found = columns["log_probs"][row, : len(stored)].double().numpy()
        np.testing.assert_allclose(found, log_p[row, stored], rtol=2**-10)
        rest = np.delete(log_p[row], stored)
        for index, temperature in enumerate(TEMPERATURES):
            tail = np.log(np.exp(rest / temperature).sum())
            np.testing.assert_allclose(columns["tail"][row, index], tail, rtol=1e-5)
    entropy = -(np.exp(log_p) * log_p).sum(1)
    np.testing.assert_allclose(columns["entropy"].numpy(), entropy, rtol=1e-5)


def test_a_tail_that_one_minus_the_sum_would_lose():
    logits = torch.zeros(1, V)
    logits[0, :K] = 30.0
    tail = encode_top_k(logits, torch.tensor([0]), K, [1.0])["tail"].item()
    expected = np.log((V - K) * np.exp(-30.0) / (K + (V - K) * np.exp(-30.0)))
    assert tail == pytest.approx(expected, rel=1e-6)


def test_draws_are_the_teachers_on_average(logits):
    """Each id's mean count over N draws of 4,000 rows lies within 5 standard errors of N p."""
    rows, draws = 4000, 20
    columns = encode_sampled(logits[:1].expand(rows, V), draws, torch.Generator().manual_seed(1))
    assert (columns["counts"].sum(1) == draws).all()
    counts = torch.zeros(rows, V, dtype=torch.long)
    counts.scatter_add_(1, columns["ids"].clamp(min=0).long(), columns["counts"].long())
    p = np.exp(log_softmax(logits[:1]))[0]
    error = np.sqrt(draws * p * (1 - p) / rows)
    assert (np.abs(counts.double().mean(0).numpy() - draws * p) <= 5 * error + 1e-12).all()


def test_drawn_ids_differ_and_pads_are_cut(logits):
    columns = encode_sampled(logits, 30, torch.Generator().manual_seed(1))
    for ids, counts in zip(columns["ids"].tolist(), columns["counts"].tolist(), strict=True):
        drawn = [id for id in ids if id >= 0]
        assert len(set(drawn)) == len(drawn) and sum(counts) == 30
        assert all((id >= 0) == (count > 0) for id, count in zip(ids, counts, strict=True))
    short = trimmed(columns)
    widest = int((columns["ids"] >= 0).sum(1).max())
    assert short["ids"].shape == short["counts"].shape == (M, widest) and short["entropy"].shape == (M,)


def test_the_same_seed_draws_the_same(logits):
    first, second = (encode_sampled(logits, 9, torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sizes(logits):
    columns = encode_top_k(logits, torch.arange(M), K, TEMPERATURES)
    assert sum(column[0].nbytes for column in columns.values()) == bytes_per_token("top_k", K, TEMPERATURES, None)
    columns = encode_sampled(logits, 9, torch.Generator())
    assert sum(column[0].nbytes for column in columns.values()) == bytes_per_token("sampled", None, (), 9)
