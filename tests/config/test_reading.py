"""Tell who takes part in a run, as the environment and the command line say it."""

import sys

import pytest

from torchtune_kd.config.reading import started_by_launcher


@pytest.mark.parametrize(
    "recipe, environment, several",
    [
        ("torchtune_kd/kd_distributed", {"RANK": "0", "WORLD_SIZE": "2"}, True),
        ("torchtune_kd/kd_distributed", {}, False),
        ("my_recipe.py", {"RANK": "0", "WORLD_SIZE": "1"}, True),
        ("my_recipe.py", {"WORLD_SIZE": "2"}, False),
        # some clusters set them in every container
        ("torchtune_kd/kd_single_device", {"RANK": "0", "WORLD_SIZE": "1"}, False),
    ],
)
def test_a_launcher_is_seen_by_its_variables_unless_the_recipe_is_for_one_device(
    monkeypatch, recipe, environment, several
):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "orig_argv", ["python", "/bin/tune", "run", recipe, "--config", "my.yaml"])
    assert started_by_launcher() is several
