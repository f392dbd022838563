"""The sides of ``benchmarks.checkpointing`` differ in nothing but checkpoints, and both are configs that run."""

import pytest
from omegaconf import OmegaConf

from helpers.checkout import benchmarks
from torchtune_kd.training import read_config


def test_the_sides_differ_in_checkpoints_alone(tmp_path):
    checkpointing = benchmarks("checkpointing")
    for name in ("teacher", "student"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    sides = {
        side: OmegaConf.to_container(
            checkpointing.side_config(side, tmp_path, tmp_path / "teacher", 50, 50, 2), resolve=True
        )
        for side in checkpointing.SIDES
    }
    for cfg in sides.values():
        settings = read_config(OmegaConf.create(cfg), distributed=False).settings
        assert settings.max_steps_per_epoch == 50 and settings.batch_size == 2
    saves = {
        side: (cfg.pop("save_every_n_steps"), cfg.pop("enable_async_checkpointing")) for side, cfg in sides.items()
    }
    assert saves == {"without": (None, False), "with": (50, False), "background": (50, True)}
    texts = {str(cfg).replace(f"out-{side}", "out") for side, cfg in sides.items()}
    assert len(texts) == 1


def test_numbers_below_one_are_refused(capsys):
    with pytest.raises(SystemExit):
        benchmarks("checkpointing").main(["--saves", "0"])
    assert "expected --pairs, --every, --saves and --rows of at least 1" in capsys.readouterr().err
