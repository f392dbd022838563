"""SmolLM2 builders: sizes, rotary embeddings, adapters, and what NF4 cannot hold."""

import inspect
from functools import partial

import pytest
import torch
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune.models.llama3_2 import lora_llama3_2, lora_llama3_2_1b
from torchtune.models.qwen2_5 import lora_qwen2_5_0_5b
from torchtune.modules import RotaryPositionalEmbeddings, TiedLinear
from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params

from torchtune_kd.models import check_nf4_build, check_nf4_shapes
from torchtune_kd.models import smollm2 as smollm2_models

ATTENTION = ["q_proj", "v_proj"]
# parameters of the published models: https://huggingface.co/HuggingFaceTB
SIZES = {"135m": (30, 134_515_008), "360m": (32, 361_821_120), "1_7b": (24, 1_711_376_384)}


def _builder(name: str):
    return getattr(smollm2_models, name)


@pytest.mark.parametrize("size", SIZES)
def test_full_models_have_the_published_sizes(size: str) -> None:
    num_layers, num_parameters = SIZES[size]
    with torch.device("meta"):
        model = _builder(f"smollm2_{size}")()
    assert len(model.layers) == num_layers
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert isinstance(model.output, TiedLinear)
    assert model.max_seq_len == 8192


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters(size: str, use_dora: bool) -> None:
    with torch.device("meta"):
        model = _builder(f"lora_smollm2_{size}")(
            ATTENTION, apply_lora_to_mlp=True, lora_rank=4, use_dora=use_dora, num_layers=2
        )
        full = _builder(f"smollm2_{size}")(num_layers=2)
    kind = DoRALinear if use_dora else LoRALinear
    adapted = {name for name, module in model.named_modules() if isinstance(module, kind)}
    assert adapted == {
        f"layers.{layer}.{name}"
        for layer in range(2)
        for name in ("attn.q_proj", "attn.v_proj", "mlp.w1", "mlp.w2", "mlp.w3")
    }
    # the rest is the full model, so a full checkpoint loads into it
    base = {name: p.shape for name, p in model.named_parameters() if name not in get_adapter_params(model)}
    assert base == {name: p.shape for name, p in full.named_parameters()}


@pytest.mark.parametrize("size", SIZES)
def test_lora_builders_name_their_arguments_as_torchtune_does(size: str) -> None:
    build = _builder(f"lora_smollm2_{size}")
    parameters = inspect.signature(build).parameters
    stock = dict(inspect.signature(lora_llama3_2_1b).parameters)
    del stock["tie_word_embeddings"]
    assert [*parameters] == [*stock, "num_layers"]
    assert all(parameters[name].default == stock[name].default for name in stock)
    assert build.__name__ == f"lora_smollm2_{size}"
    assert build.__doc__.startswith(f"Build SmolLM2 {size.replace('_', '.').upper()} with LoRA")
    with pytest.raises(ValueError, match="apply_lora_to_output"):
        build(ATTENTION, apply_lora_to_output=True, num_layers=1)


@pytest.mark.parametrize("num_layers", [0, -1, 31])
@pytest.mark.parametrize("build", [smollm2_models.smollm2_135m, partial(smollm2_models.lora_smollm2_135m, ATTENTION)])
def test_wrong_number_of_layers(build, num_layers: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 30.*135M, but got {num_layers}"):
        build(num_layers=num_layers)


@pytest.mark.parametrize(("size", "base"), [("135m", 100_000), ("1_7b", 130_000)])
def test_rope_is_plain(size: str, base: int) -> None:
    from torchtune_kd.models.smollm2.model_builders import _CONFIGS

    config = _CONFIGS[size] | {"num_layers": 1, "vocab_size": 8, "intermediate_dim": 8}
    model = smollm2_models.model_builders.llama3_2(**config)
    rope = model.layers[0].attn.pos_embeddings
    plain = RotaryPositionalEmbeddings(64, max_seq_len=8192, base=base)
    # Llama 3's formula rounds some frequencies differently; 8191 times that stays below 1e-3 radians
    torch.testing.assert_close(rope.cache, plain.cache, atol=1e-3, rtol=0)
    torch.testing.assert_close(rope.theta, plain.theta, atol=0, rtol=1e-6)


@pytest.mark.parametrize("size", ["135m", "360m"])
def test_quantising_a_small_model_names_the_layer(size: str) -> None:
    width = {"135m": 576, "360m": 960}[size]
    with pytest.raises(ValueError, match=rf"16384.*layers\.0\.attn\.q_proj\.weight of shape \[{width}, {width}\]"):
        _builder(f"lora_smollm2_{size}")(ATTENTION, quantize_base=True)


def test_qlora_of_the_large_model() -> None:
    with torch.device("meta"):
        model = smollm2_models.qlora_smollm2_1_7b(ATTENTION, num_layers=1)
    quantised = [name for name, parameter in model.named_parameters() if isinstance(parameter, NF4Tensor)]
    assert len(quantised) == 7


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(256, 256), (512, 512), (128, 896), (384, 128), (192, 576), (576, 576), (64, 256)])
def test_rule_is_that_of_torchao(shape: tuple[int, int], world_size: int) -> None:
    """The rule allows exactly what torchao can quantise and split by rows into equal shards."""
    try:
        shards = torch.chunk(to_nf4(torch.randn(shape)), world_size, dim=0)
        works = len(shards) == world_size and len({shard.shape for shard in shards}) == 1
        works = works and sum(shard.shape[0] for shard in shards) == shape[0]
    except AssertionError:
        works = False
    if works:
        check_nf4_shapes([("w", shape)], world_size)
    else:
        with pytest.raises(ValueError, match=f"w of shape \\[{shape[0]}, {shape[1]}\\]"):
            check_nf4_shapes([("w", shape)], world_size)


def test_check_of_any_builder() -> None:
    sizes = {"vocab_size": 10, "num_heads": 2, "num_kv_heads": 2, "max_seq_len": 8, "intermediate_dim": 512}
    build = partial(lora_llama3_2, ATTENTION, num_layers=1, lora_rank=2, lora_alpha=2, quantize_base=True, **sizes)
    check_nf4_build(partial(build, embed_dim=256))
    check_nf4_build(partial(build, embed_dim=256), world_size=4)
    with pytest.raises(ValueError, match=r"each of 8 ranks.*q_proj.*use fewer ranks"):
        check_nf4_build(partial(build, embed_dim=256), world_size=8)
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.q_proj\.weight of shape \[192, 192\]"):
        check_nf4_build(partial(build, embed_dim=192))
    # Qwen 2.5 0.5B fits one rank, but its 49 blocks a matrix do not split in two
    qwen = partial(lora_qwen2_5_0_5b, ATTENTION, quantize_base=True)
    check_nf4_build(qwen)
    with pytest.raises(ValueError, match=r"each of 2 ranks.*\[896, 896\]"):
        check_nf4_build(qwen, world_size=2)


def test_check_of_an_unquantised_model_leaves_the_output_out() -> None:
    sizes = {"num_heads": 2, "num_kv_heads": 2, "max_seq_len": 8, "intermediate_dim": 512, "embed_dim": 256}
    with torch.device("meta"):
        model = lora_llama3_2(
            ATTENTION,
            num_layers=1,
            vocab_size=10,  # [10, 256] could not be quantised, and never is
            tie_word_embeddings=False,
            lora_rank=2,
            lora_alpha=2,
            **sizes,
        )
    check_nf4_shapes(model)
    check_nf4_shapes(model, world_size=2)
