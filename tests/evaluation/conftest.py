"""Candidates with random weights, loaded as an evaluation loads them."""

import pytest
import torch

from helpers.tiny import make_config
from torchtune_kd.config.reading import read_config
from torchtune_kd.config.settings import Settings
from torchtune_kd.distributed.world import World
from torchtune_kd.evaluation.candidates import load_candidate, sources_of


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="session")
def candidates(tiny_config):
    """The teacher (grouped queries, a head of its own) and the untrained student (tied head) in fp32."""
    sources = sources_of(read_config(tiny_config, distributed=False))
    settings = Settings(output_dir="unused", device="cpu", dtype="fp32")
    return {name: load_candidate(source, settings, World(torch.device("cpu"))) for name, source in sources.items()}


@pytest.fixture(scope="session")
def tokenizer(tiny_config):
    return read_config(tiny_config, distributed=False).tokenizer.build()
