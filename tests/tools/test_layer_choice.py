"""Which layers a student keeps: measures against their definitions, and choices by them."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.pruning import LAYERS, small_model, write_teacher
from helpers.tiny import VOCAB
from torchtune_kd.models.smollm2 import smollm2_tokenizer
from torchtune_kd.tools import layer_influence, removal_influence, select_layers, text_batches

MEASURES = [layer_influence, removal_influence]


def _silence(layer: nn.Module) -> None:
    """Make a layer return its input."""
    nn.init.zeros_(layer.attn.output_proj.weight)
    nn.init.zeros_(layer.mlp.w2.weight)


def test_layer_influence_is_one_minus_the_cosine() -> None:
    model = small_model()
    batches = [torch.randint(0, VOCAB, (2, 9)), torch.randint(0, VOCAB, (1, 5))]
    changes = []  # per batch [L, tokens]
    for tokens in batches:
        states = [model.tok_embeddings(tokens)]
        for layer in model.layers:
            states.append(layer(states[-1]))
        cosines = [F.cosine_similarity(x, y, dim=-1).flatten() for x, y in pairwise(states)]
        changes.append(1 - torch.stack(cosines))
    expected = torch.cat(changes, dim=1).mean(dim=1)
    torch.testing.assert_close(layer_influence(model, batches), expected)


@torch.no_grad()
def test_removal_influence_compares_last_hidden_states() -> None:
    model = small_model()
    tokens = torch.randint(0, VOCAB, (2, 9))

    def last(left_out: int | None) -> torch.Tensor:
        h = model.tok_embeddings(tokens)
        for index, layer in enumerate(model.layers):
            h = h if index == left_out else layer(h)
        return model.norm(h)

    expected = [1 - F.cosine_similarity(last(None), last(i), dim=-1).mean() for i in range(LAYERS)]
    torch.testing.assert_close(removal_influence(model, [tokens]), torch.stack(expected))


@pytest.mark.parametrize("measure", MEASURES)
def test_layers_that_do_nothing_are_left_out(measure) -> None:
    model = small_model()
    for index in (1, 4):
        _silence(model.layers[index])
    influence = measure(model, [torch.randint(0, VOCAB, (2, 16))])
    assert influence[[1, 4]].abs().max() < 1e-6
    strategy = {layer_influence: "influence", removal_influence: "removal"}[measure]
    assert select_layers(LAYERS, 4, strategy, influence) == [0, 2, 3, 5]


@pytest.mark.parametrize("measure", MEASURES)
def test_ignored_labels_do_not_count(measure) -> None:
    model = small_model()
    tokens = torch.randint(0, VOCAB, (2, 8))
    labels = tokens.clone()
    labels[:, 5:] = -100
    # attention is causal: the first five tokens do not see the others
    torch.testing.assert_close(measure(model, [{"tokens": tokens, "labels": labels}]), measure(model, [tokens[:, :5]]))
    with pytest.raises(ValueError, match="no token that counts"):
        measure(model, [{"tokens": tokens, "labels": torch.full_like(labels, -100)}])
    with pytest.raises(ValueError, match="no token that counts"):
        measure(model, [])


@pytest.mark.parametrize("measure", MEASURES)
def test_packed_batches_keep_documents_apart(measure) -> None:
    model = small_model()
    documents = torch.randint(0, VOCAB, (2, 4))
    packed = {
        "tokens": documents.view(1, 8),
        "mask": torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).tril().bool()[None],
        "input_pos": torch.arange(4).repeat(2)[None],
    }
    torch.testing.assert_close(measure(model, [packed]), measure(model, [documents]))


@pytest.mark.parametrize("measure", MEASURES)
def test_measuring_leaves_the_model_alone(measure) -> None:
    model = small_model().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    measure(model, [torch.randint(0, VOCAB, (1, 4))])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("num_layers", "keep", "expected"),
    [(30, 30, list(range(30))), (30, 3, [0, 14, 29]), (6, 2, [0, 5]), (6, 1, [0]), (1, 1, [0])],
)
def test_even_layers(num_layers: int, keep: int, expected: list[int]) -> None:
    assert select_layers(num_layers, keep) == expected


def test_even_layers_are_distinct_and_spaced() -> None:
    for num_layers in range(1, 40):
        for keep in range(2, num_layers + 1):
            layers = select_layers(num_layers, keep, "even")
            gaps = {b - a for a, b in pairwise(layers)}
            assert len(layers) == keep
            assert (layers[0], layers[-1]) == (0, num_layers - 1)
            assert max(gaps) - min(gaps) <= 1
            assert min(gaps) >= 1


def test_largest_influence_is_kept() -> None:
    assert select_layers(5, 3, "influence", [0.5, 0.1, 0.3, 0.2, 0.9]) == [0, 2, 4]
    assert select_layers(5, 2, "removal", torch.tensor([0.5, 0.5, 0.5, 0.2, 0.1])) == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((30, 0), "keep 1 to 30 layers, but got 0"),
        ((30, 31), "keep 1 to 30 layers, but got 31"),
        ((30, 15, "odd"), "strategies even, influence, removal, but got 'odd'"),
        ((30, 15, "influence"), "30 influence values.*but got none; measure them with layer_influence"),
        ((3, 1, "removal", [0.1]), "3 influence values.*but got 1; measure them with removal_influence"),
        ((2, 1, "influence", [0.1, float("nan")]), "finite influence values"),
    ],
)
def test_bad_choices(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_layers(*arguments)


def test_text_batches(tmp_path: Path) -> None:
    tokenizer = smollm2_tokenizer(write_teacher(tmp_path))
    text = "".join(chr(97 + position // 8) for position in range(80))  # 10 rows of 8 equal letters
    batches = text_batches(tokenizer, text, seq_len=8, num_sequences=5)
    assert [tokenizer.decode(batch[0].tolist()) for batch in batches] == [letter * 8 for letter in "acegi"]
    assert len(text_batches(tokenizer, text, seq_len=8, num_sequences=99)) == 10
    with pytest.raises(ValueError, match="at least 81 tokens, but got 80"):
        text_batches(tokenizer, text, seq_len=81)
