"""Under the real ``tune run``: a worker that dies is started again and goes on; a signal to torchrun reaches it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from helpers.forked import ForkedRun
from helpers.resumable import log_of, resumable_config, weights_of
from helpers.tiny import make_config, run_tune
from torchtune_kd.checkpoints.folders import step_folders
from torchtune_kd.checkpoints.writer import check_whole
from torchtune_kd.distributed.world import World


@contextlib.contextmanager
def launched(cfg, *options):
    """torchrun's agent; whatever it has started is gone afterwards."""
    agent = launch(cfg, *options)
    try:
        yield agent
    finally:
        for pid in workers(agent) if agent.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        agent.kill()
        agent.wait()


def launch(cfg, *options):
    path = Path(f"{cfg.output_dir}.yaml")
    OmegaConf.save(cfg, path)
    command = [str(Path(sys.executable).parent / "tune"), "run", "--nproc_per_node", "2", *options]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    return subprocess.Popen(
        [*command, "torchtune_kd/kd_distributed", "--config", str(path)],
        # with a store of its own for each start: PyTorch 2.13 lets restarted workers read previous_run addresses
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=Path(f"{cfg.output_dir}.txt").open("w"),
    )


def wait_for_checkpoint(cfg, agent):
    deadline = time.monotonic() + 240
    while not step_folders(Path(cfg.output_dir)):
        assert agent.poll() is None and time.monotonic() < deadline, Path(f"{cfg.output_dir}.txt").read_text()[-3000:]
        time.sleep(0.05)


def workers(agent):
    """The processes that the agent started."""
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.nightly  # what it goes on from is tested by day, torchrun's restart at night alone
def test_max_restarts_goes_on_from_the_last_checkpoint_by_itself(tmp_path):
    options = {"batch_size": 2, "save_every_n_steps": 1, "epochs": 6}
    cfg = resumable_config(tmp_path, output_dir=str(tmp_path / "restarted"), resume_from_checkpoint=True, **options)
    with launched(cfg, "--max_restarts", "1") as agent:
        wait_for_checkpoint(cfg, agent)
        os.kill(workers(agent)[-1], signal.SIGKILL)
        assert agent.wait(300) == 0, Path(f"{cfg.output_dir}.txt").read_text()[-3000:]
    output = Path(f"{cfg.output_dir}.txt").read_text()
    assert output.count("There is no checkpoint in") == 1 and output.count(f"Going on with {cfg.output_dir}/step_") == 1
    undisturbed = resumable_config(tmp_path, output_dir=str(tmp_path / "undisturbed"), **options)
    ForkedRun(undisturbed, 2).finish()
    assert log_of(cfg) == log_of(undisturbed)
    for name, weight in weights_of(undisturbed, 5).items():
        assert torch.equal(weight, weights_of(cfg, 5)[name]), name


@pytest.mark.slow
def test_a_signal_to_torchrun_is_a_checkpoint(tmp_path):
    """SLURM's USR1, which torchrun passes on when told to."""
    cfg = resumable_config(tmp_path, output_dir=str(tmp_path / "stopped"), batch_size=2, epochs=50)
    with launched(cfg, "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1") as agent:
        wait_for_checkpoint(cfg, agent)
        agent.send_signal(signal.SIGUSR1)
        assert agent.wait(60) != 0
    output = Path(f"{cfg.output_dir}.txt").read_text()
    newest = step_folders(tmp_path / "stopped")[0]
    assert f"stopped: SIGUSR1 ended the run after step {newest.name.removeprefix('step_')}; its checkpoint is" in output
    assert check_whole(newest, World(torch.device("cpu"))).processes == 2


@pytest.mark.slow
@pytest.mark.parametrize("key, sentence", [("epoch", "Unknown key `epoch`"), ("checkpoint_files", "no.safetensors")])
def test_a_mistake_that_every_process_makes_is_said_once(tmp_path, key, sentence):
    """Before the processes have met, and after."""
    cfg = make_config(tmp_path)
    if key == "epoch":
        cfg.epoch = 2
    else:
        cfg.checkpointer.checkpoint_files = ["no.safetensors"]
    done = run_tune(cfg, "torchtune_kd/kd_distributed", nproc=2, check=False)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and sentence in errors[0], done.stderr[-4000:]
