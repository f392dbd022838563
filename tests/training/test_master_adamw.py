"""bf16 weights trained by fp32 copies go where fp32 weights would go."""

import copy

import pytest
import torch

from torchtune_kd.training.master_adamw import MasterAdamW

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def gradients(num_steps, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 32, generator=generator).to(dtype) for _ in range(num_steps)]


def train(weight, optimizer, grads):
    for grad in grads:
        weight.grad = grad.to(weight.dtype)
        optimizer.step()
        optimizer.zero_grad()


def weight_in(dtype):
    generator = torch.Generator().manual_seed(1)
    return torch.nn.Parameter(torch.randn(64, 32, generator=generator).bfloat16().to(dtype))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_adamw_on_fp32_weights_rounded_once(dtype, fused):
    ours, plain = weight_in(dtype), weight_in(torch.float32)
    train(ours, MasterAdamW([ours], fused=fused, **OPTIONS), gradients(20))
    train(plain, torch.optim.AdamW([plain], **OPTIONS), gradients(20))
    torch.testing.assert_close(ours, plain.to(dtype), rtol=0, atol=0 if dtype == torch.bfloat16 else 1e-6)


def test_updates_too_small_for_bf16_add_up():
    """100 updates of 1e-5 each on weights of 1: plain bf16 AdamW loses every one of them."""
    up = [-torch.ones(4, 4)] * 100
    ours, plain = (torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = MasterAdamW([ours], lr=1e-5, weight_decay=0.0)
    train(ours, optimizer, up)
    train(plain, torch.optim.AdamW([plain], lr=1e-5, weight_decay=0.0), up)
    torch.testing.assert_close(optimizer.state[ours]["master"], torch.full((4, 4), 1.001), rtol=0, atol=1e-5)
    assert (plain == 1).all()


def test_a_saved_state_goes_on_where_it_stopped():
    grads = gradients(10)
    whole = weight_in(torch.bfloat16)
    train(whole, MasterAdamW([whole], **OPTIONS), grads)
    first = weight_in(torch.bfloat16)
    before = MasterAdamW([first], **OPTIONS)
    train(first, before, grads[:5])
    second = torch.nn.Parameter(first.detach().clone())
    after = MasterAdamW([second], lr=0.5)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert all(after.state[second][name].dtype == torch.float32 for name in ("master", "exp_avg", "exp_avg_sq"))
    train(second, after, grads[5:])
    assert torch.equal(second, whole)


def test_weights_without_a_gradient_stay_and_keep_no_state():
    trained, idle = weight_in(torch.bfloat16), weight_in(torch.bfloat16)
    optimizer = MasterAdamW([{"params": [trained]}, {"params": [idle], "lr": 0.1}], **OPTIONS)
    train(trained, optimizer, gradients(1))
    assert torch.equal(idle, weight_in(torch.bfloat16)) and not optimizer.state[idle]
    assert not torch.equal(trained, weight_in(torch.bfloat16))


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"eps": float("nan")}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="Expected"):
        MasterAdamW([weight_in(torch.bfloat16)], **wrong)
