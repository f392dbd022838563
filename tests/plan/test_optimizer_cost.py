"""What an optimizer costs is read off the real one."""

import pytest
import torch
from torchao.optim import AdamW8bit

from torchtune_kd.config.sections import Section
from torchtune_kd.plan.optimizer_cost import optimizer_cost
from torchtune_kd.plan.tracker import tensor_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def cost(name, device=CPU, dtype=torch.bfloat16, **options):
    return optimizer_cost(Section("optimizer", name, {"lr": 1e-3, **options}), dtype, device)


@pytest.mark.parametrize(
    ("name", "options", "dtype", "state"),
    [
        ("torch.optim.AdamW", {"fused": True}, torch.bfloat16, 4),
        ("torch.optim.AdamW", {}, torch.float32, 8),
        ("torch.optim.SGD", {}, torch.float32, 0),
        ("torch.optim.SGD", {"momentum": 0.9}, torch.float32, 4),
        ("torchtune_kd.training.master_adamw.MasterAdamW", {}, torch.bfloat16, 12),
    ],
)
def test_state_per_element(name, options, dtype, state):
    found = cost(name, dtype=dtype, **options)
    assert found.state == state
    assert found.state_bytes(1000) == 1000 * state


def test_temporaries_grow_with_all_parameters_or_with_the_largest():
    master = cost("torchtune_kd.training.master_adamw.MasterAdamW")
    assert master.temporary_of_all == 4 and master.temporary_of_one == 0  # gradients in fp32
    assert master.temporary_bytes(1000, 100) == 4000
    one_by_one = cost("torch.optim.AdamW", dtype=torch.float32)
    assert one_by_one.temporary_of_all == 0 and one_by_one.temporary_of_one >= 4
    at_once = cost("torch.optim.AdamW", CUDA, dtype=torch.float32)  # PyTorch's default there
    assert at_once.temporary_of_all >= 4
    fused = cost("torch.optim.AdamW", CUDA, fused=True)
    assert fused.temporary_of_all == 0


def test_what_does_not_grow_with_the_elements_or_is_not_there_is_not_known():
    assert cost("torch.optim.Adafactor") is None
    assert cost("torch.optim.AdamW", no_such_option=1) is None


def test_the_8_bit_state_is_that_of_a_large_parameter():
    """One byte per element and state, a scale per 256; what is below 4096 elements stays in the weights' dtype."""
    found = cost("torchao.optim.AdamW8bit")
    parameter = torch.nn.Parameter(torch.randn(128, 256, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    optimizer = AdamW8bit([parameter], lr=1e-3)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    state = sum(map(tensor_bytes, (optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq"))))
    assert found.state_bytes(parameter.numel()) == pytest.approx(state, rel=0.05)
    assert found.state == pytest.approx(2 * (1 + 4 / 256), rel=0.01)
