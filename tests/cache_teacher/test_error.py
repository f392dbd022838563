"""The error that a cache states, against NumPy in fp64."""

import numpy as np
import torch

from torchtune_kd.cache_teacher.error import error_of
from torchtune_kd.losses.signals import Head


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_the_figures_are_the_formulas():
    torch.manual_seed(0)
    n, width, vocab = 600, 8, 30  # more than one chunk of rows
    states = torch.randn(n, width)
    stored = states + 0.05 * torch.randn(n, width)
    weight, bias, labels = torch.randn(vocab, width), torch.randn(vocab), torch.randint(vocab, (n,))
    found = error_of(states, stored, labels, Head(weight, bias))
    p, q = (softmax(h.double().numpy() @ weight.double().numpy().T + bias.double().numpy()) for h in (states, stored))
    kl = (p * np.log(p / q)).sum(1)
    y = np.eye(vocab)[labels.numpy()]
    assert found["tokens"] == n
    np.testing.assert_allclose(found["kl_mean"], kl.mean(), rtol=1e-4)
    np.testing.assert_allclose(found["kl_max"], kl.max(), rtol=1e-4)
    assert found["top1_changed"] == np.mean(p.argmax(1) != q.argmax(1))
    np.testing.assert_allclose(found["gradient_error"], np.linalg.norm(q - p) / np.linalg.norm(p - y), rtol=1e-5)


def test_equal_states_have_no_error():
    states = torch.randn(5, 4)
    found = error_of(states, states, torch.zeros(5, dtype=torch.long), Head(torch.randn(7, 4), None))
    assert found == {"tokens": 5, "kl_mean": 0, "kl_max": 0, "top1_changed": 0, "gradient_error": 0}
