"""A teacher's head in 8-bit floats: what becomes of the decoder's own, and what is said of it."""

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config

from helpers.tiny import TEACHER, VOCAB, model_section
from torchtune_kd.config.settings import Settings
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError
from torchtune_kd.kernels import float8_weight
from torchtune_kd.models import float8_head
from torchtune_kd.models.float8_head import check_head, described, loader, replace_head
from torchtune_kd.models.output_head import skip_output_head

SETTINGS = Settings(output_dir="out", device="cpu", dtype="bf16")


def build(tied: bool, **more):
    torch.manual_seed(1)
    return config.instantiate(OmegaConf.create(model_section("full", TEACHER | more, tied=tied)))


def weights_of(decoder):
    return {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_head_is_that_of_the_checkpoint_and_its_weight_is_freed(device, tied):
    decoder = build(tied)
    weights = weights_of(decoder)
    expected = float8_weight(weights["tok_embeddings.weight" if tied else "output.weight"].bfloat16())
    decoder.to(device)
    head = replace_head(decoder, loader(weights, SETTINGS, World(torch.device("cpu"))))
    assert torch.equal(head.weight.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(head.weight.scale, expected.scale)
    assert head.bias is None
    left = {name for name, _ in decoder.named_parameters()}
    assert left == weights.keys() - {"output.weight"}


def test_hidden_states_stay_what_they_are():
    decoder, tokens = build(tied=False), torch.arange(12).view(2, 6)
    weights = weights_of(decoder)
    before = skip_output_head(decoder)(tokens)
    replace_head(decoder, weights.__getitem__)
    assert torch.equal(decoder(tokens), before)


def test_a_bias_stays_as_it_is():
    decoder = build(tied=False)
    decoder.output = torch.nn.Linear(TEACHER["embed_dim"], VOCAB)
    weights = weights_of(decoder)
    head = replace_head(decoder, weights.__getitem__)
    assert torch.equal(head.bias, weights["output.bias"])
    assert not [name for name, _ in decoder.named_parameters() if name.startswith("output")]


def test_a_width_that_cannot_be():
    decoder = build(tied=False, embed_dim=24)
    said = (
        "`teacher_head: float8` does not fit `teacher_model`: 8-bit floats need a teacher whose hidden width is a "
        "multiple of 16, but that of weight is 24; leave its head as it is"
    )
    for call in (check_head, lambda decoder: replace_head(decoder, weights_of(decoder).__getitem__)):
        with pytest.raises(UserError) as caught:
            call(decoder.to("meta"))
        assert str(caught.value).startswith(said)
    check_head(build(tied=True))


def test_one_sentence_says_what_it_is(monkeypatch):
    decoder = build(tied=False)
    head = replace_head(decoder, weights_of(decoder).__getitem__)
    text = described(head, decoder, SETTINGS)
    assert text.startswith("The teacher's head is in 8-bit floats, 0.1 MiB instead of 0.2; ")
    assert text.endswith("; cpu has no product of them in bf16, so it is emulated, which is slower.")
    monkeypatch.setattr(float8_head, "has_float8_product", lambda device, dtype: True)
    assert described(head, decoder, SETTINGS) == "The teacher's head is in 8-bit floats, 0.1 MiB instead of 0.2."
    tied = build(tied=True)
    head = replace_head(tied, weights_of(tied).__getitem__)
    text = described(head, tied, SETTINGS)
    assert text == "The teacher's head is in 8-bit floats, 0.1 MiB beside the embedding, which it is tied to."
