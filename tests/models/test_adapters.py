"""What adapters compute."""

import pytest
import torch
from torchtune.modules.peft import DoRALinear, get_merged_lora_ckpt

from torchtune_kd.models.adapters import BiasedDoRALinear, leave_biases_unscaled


@pytest.mark.parametrize("quantize_base", [False, True])
def test_dora_with_a_bias_computes_what_its_merged_weight_does(quantize_base):
    layer = DoRALinear(256, 128, rank=4, alpha=8, use_bias=True, quantize_base=quantize_base)
    torch.nn.init.normal_(layer.lora_b.weight)
    torch.nn.init.uniform_(layer.magnitude, 0.5, 2.0)
    torch.nn.init.normal_(layer.bias)
    model = torch.nn.Sequential(layer)
    leave_biases_unscaled(model)
    assert type(model[0]) is BiasedDoRALinear
    state = {name: weight.detach() for name, weight in model.named_parameters()}
    state["0.weight"] = layer.weight.detach().to(torch.float32)
    merged = get_merged_lora_ckpt(dict(state), rank=4, alpha=8)
    x = torch.randn(3, 256)
    truth = torch.nn.functional.linear(x, merged["0.weight"], merged["0.bias"])
    torch.testing.assert_close(model(x), truth, rtol=0, atol=2e-5)
    model(x).square().sum().backward()
    assert layer.magnitude.grad.any() and layer.lora_a.weight.grad.any() and layer.lora_b.weight.grad.any()
    layer.disabled = True
    base = torch.nn.functional.linear(x, state["0.weight"], state["0.bias"])
    torch.testing.assert_close(model(x), base, rtol=0, atol=2e-5)
