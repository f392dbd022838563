"""A checkpoint of one number of processes is loaded on another: the same run, to rounding."""

import pytest
import torch
from omegaconf import OmegaConf

from helpers.forked import ForkedRun
from helpers.resumable import resumable_config, weights_of
from helpers.tiny import read_log
from torchtune_kd.checkpoints.folders import step_folders


def start(cfg, size):
    """One process is the single-device recipe where ``size`` is 0, else FSDP2 over ``size`` processes."""
    return ForkedRun(cfg, max(size, 1), distributed=size > 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("sizes", [(2, 1), (2, 0), (0, 2), (4, 2), (1, 4)], ids=str)
def test_another_number_of_processes_goes_on_with_the_same_run(tmp_path, sizes, kind):
    """12 rows a step, whoever works on them. No dropout: every process draws its own."""
    options = {"batch_size": 12, "epochs": 3, "run_val_every_n_steps": None, "optimizer__lr": 1e-4}
    undisturbed = resumable_config(tmp_path, kind, output_dir=str(tmp_path / "undisturbed"), **options)
    cfg = resumable_config(tmp_path, kind, output_dir=str(tmp_path / "moved"), **options)
    if kind == "lora":
        undisturbed.model.lora_dropout = cfg.model.lora_dropout = 0.0
    start(undisturbed, 0).finish()

    cfg.batch_size = 12 // max(sizes[0], 1)
    first = start(cfg, sizes[0])
    assert first.wait_for("step", 4)
    first.kill()
    assert step_folders(tmp_path / "moved")
    cfg.batch_size = 12 // max(sizes[1], 1)
    output = start(OmegaConf.merge(cfg, {"resume_from_checkpoint": True}), sizes[1]).finish()
    assert "Going on with" in output

    logs = [read_log(c.output_dir) for c in (cfg, undisturbed)]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    for line, other in zip(*logs, strict=True):
        for name in other.keys() & {"loss", "kd_loss", "lr", "grad_norm", "val_loss"}:
            assert line[name] == pytest.approx(other[name], rel=1e-5), (line["step"], name)
    for name, weight in weights_of(undisturbed, 2).items():
        torch.testing.assert_close(weights_of(cfg, 2)[name], weight, rtol=0, atol=1e-5)
