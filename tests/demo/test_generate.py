"""Greedy generation with caches writes what the model without caches finds most likely."""

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config

from helpers.tiny import TEACHER, model_section
from torchtune_kd.data import prose
from torchtune_kd.evaluation import speed
from torchtune_kd.generation import engine as generate


@pytest.fixture
def model():
    torch.manual_seed(0)
    return config.instantiate(OmegaConf.create(model_section("full", TEACHER))).eval()


@torch.no_grad()
def test_caches_change_nothing(model):
    prompt = [5, 17, 300, 42]
    tokens = list(prompt)
    for _ in range(12):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    expected = tokens[len(prompt) :]
    generate.with_caches(model, 16)
    assert generate.greedy(model, prompt, 12) == expected
    assert generate.greedy(model, prompt, 12) == expected  # no trace of the first time
    assert generate.greedy(model, prompt, 12, stop_tokens=[expected[3]]) == expected[: expected.index(expected[3])]


def test_speed_counts_every_token(model, monkeypatch):
    """With a clock that moves a tenth of a second a call, 8 tokens take a tenth."""
    clock = iter(i / 10 for i in range(1000))
    monkeypatch.setattr(generate.time, "perf_counter", lambda: next(clock))
    generate.with_caches(model, 16)
    speeds = speed.tokens_per_second([model, model], [1, 2, 3], 8)
    assert speeds.per_second == pytest.approx([80.0, 80.0])
    assert (speeds.tokens, speeds.repeats) == (8, 3)


@pytest.fixture
def slow_model(model, monkeypatch):
    """A model whose every pass takes a second, by the clocks that are read."""
    now = [100.0]

    def wait(*_):
        now[0] += 1

    model.register_forward_hook(wait)
    monkeypatch.setattr(generate.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(generate.time, "perf_counter", lambda: now[0])
    return generate.with_caches(model, 64)


def test_a_text_ends_when_its_seconds_are_over(slow_model):
    whole = generate.greedy(slow_model, [1, 2, 3], 12)
    assert generate.greedy(slow_model, [1, 2, 3], 12, seconds=5) == whole[:5]
    assert generate.greedy(slow_model, [1, 2, 3], 12, seconds=-1) == whole[:1]


@pytest.mark.parametrize(
    "seconds, tokens, repeats, passes",
    [(1000, 8, 3, 64), (50, 8, 3, 64), (40, 8, 2, 48), (26, 7, 1, 28), (8, 2, 1, 8), (-5, 1, 1, 4)],
)
def test_speed_is_measured_in_the_time_there_is(slow_model, monkeypatch, seconds, tokens, repeats, passes):
    begin = generate.time.monotonic()
    speeds = speed.tokens_per_second([slow_model, slow_model], [1, 2, 3], 8, seconds=seconds)
    assert speeds.per_second == pytest.approx([1.0, 1.0])
    assert (speeds.tokens, speeds.repeats, generate.time.monotonic() - begin) == (tokens, repeats, passes)


def test_pace_is_seconds_of_the_layers_by_tokens(model, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(generate.time, "perf_counter", lambda: float(next(clock)))
    assert speed.seconds_per_token(model, 8) == pytest.approx(1 / 8)


def test_prompts_are_the_beginnings_of_held_out_prose():
    paragraph = "The {} method returns what it was given, and does so without\nlooking; " + "more words follow. " * 8
    documents = {"long": f"Heading\n=======\n\n{paragraph.format('first')}\n\n   code\n\n{paragraph.format('second')}"}
    one, two = prose.held_out_prompts(documents, 2)
    assert one.startswith("The first method returns") and two.startswith("The second method returns")
    documents["short"] = paragraph.format("third")
    assert prose.held_out_prompts(documents, 2) == [one, one.replace("first", "third")]
    assert prose.held_out_prompts({"table": "a b c d e f"}, 2) == ["a b c d e f", "d e f"]
