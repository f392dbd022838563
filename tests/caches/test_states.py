"""Compare how states are stored with NumPy."""

import numpy as np
import pytest
import torch

from torchtune_kd.caches.states import FLOATS, bytes_per_token, channel_rms, decode, encode

M, D = 40, 24


@pytest.fixture
def states():
    """Channels of very different size, as in a language model."""
    torch.manual_seed(0)
    return torch.randn(M, D) * torch.logspace(-2, 2, D)


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_are_rounded_and_nothing_else(states, dtype):
    columns = encode(states, dtype, torch.ones(D))
    assert columns["states"].dtype == FLOATS[dtype]
    assert torch.equal(decode(columns, torch.float32, torch.ones(D)), states.to(FLOATS[dtype]).float())
    assert columns["states"][0].nbytes == bytes_per_token(dtype, D)


def test_int8_is_the_formula(states):
    rms = channel_rms(states)
    h = states.double().numpy()
    c = np.sqrt((h**2).mean(0))
    np.testing.assert_allclose(rms.numpy(), c, rtol=1e-6)
    columns = encode(states, "int8", rms)
    scale = (np.abs(h / c).max(1) / 127).astype(np.float16)
    np.testing.assert_allclose(columns["scale"].numpy(), scale, rtol=1e-3)
    scale = columns["scale"].double().numpy()[:, None]
    assert np.abs(columns["states"].double().numpy() - h / c / scale).max() <= 0.5 + 1e-3
    back = decode(columns, torch.float64, rms)
    assert (np.abs(back.numpy() - h) <= (0.5 + 1e-3) * c * scale).all()
    assert columns["states"][0].nbytes + columns["scale"][0].nbytes == bytes_per_token("int8", D)


def test_int8_uses_its_steps_in_every_channel(states):
    """Without the channels' own sizes the small ones would be 0."""
    rms = channel_rms(states)
    error = (decode(encode(states, "int8", rms), torch.float32, rms) - states).square().mean(0).sqrt() / rms
    assert error.max() < 0.02


def test_a_channel_or_token_of_zeros_stays_zero():
    states = torch.randn(3, 4)
    states[:, 1] = 0
    states[2] = 0
    rms = channel_rms(states)
    back = decode(encode(states, "int8", rms), torch.float32, rms)
    assert back.isfinite().all() and (back[:, 1] == 0).all() and (back[2] == 0).all()
