"""The training process: what is shown of it, what is kept, and how it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

from torchtune_kd.demo import train
from torchtune_kd.demo.output import DemoError
from torchtune_kd.reports.logs import read_log


def python(code):
    return [sys.executable, "-c", code]


@pytest.mark.heavy
def test_progress_is_shown_and_everything_is_kept(tmp_path, capsys):
    code = r"import sys; print('the config'); sys.stderr.write('\r 50%'); sys.stderr.write('\r100%\nstep 2\n')"
    train.run_recipe(python(code), tmp_path / "run" / "tune.log")
    assert capsys.readouterr().out == "\r 50%\r100%\nstep 2\n"
    assert (tmp_path / "run" / "tune.log").read_bytes() == b"the config\n\r 50%\r100%\nstep 2\n"


@pytest.mark.heavy
def test_a_failure_is_one_sentence_with_its_exit_code(tmp_path):
    code = "import sys; print('error: Unknown key `lrr`: did you mean `lr`?', file=sys.stderr); sys.exit(7)"
    with pytest.raises(DemoError, match=r"exit code 7 \(error: Unknown key `lrr`: did you mean `lr`\?\)") as error:
        train.run_recipe(python(code), tmp_path / "tune.log")
    assert error.value.exit_code == 7
    assert "\n" not in str(error.value)


@pytest.mark.heavy
def test_ctrl_c_ends_the_training_process_too(tmp_path):
    script = (
        # a shell that starts the tests in the background lets them ignore SIGINT, and children inherit that
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pathlib import Path; from torchtune_kd.demo import train; "
        "train.run_recipe([sys.executable, '-c', "
        "'import os, time; print(os.getpid(), chr(13), flush=True); time.sleep(100)'], Path('tune.log'))"
    )
    process = subprocess.Popen(python(script), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    log = tmp_path / "tune.log"
    deadline = time.monotonic() + 60
    try:
        while not (log.exists() and log.read_text().strip()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        child = int(log.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
    finally:
        process.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_the_log_of_torchtunes_disk_logger_is_read(tmp_path):
    from torchtune.training.metric_logging import DiskLogger

    logger = DiskLogger(str(tmp_path))
    logger.log_dict({"val_kl": 7.25}, step=0)
    logger.log_dict({"loss": 9.5, "kl": 7.0, "lr": 1e-05}, step=1)
    logger.log_dict({"val_kl": 6.5}, step=1)
    logger.close()
    steps, validations = read_log(tmp_path)
    assert steps == [{"step": 1, "loss": 9.5, "kl": 7.0, "lr": 1e-05}]
    assert validations == [{"step": 0, "val_kl": 7.25}, {"step": 1, "val_kl": 6.5}]


def test_the_config_is_the_shipped_one_with_overrides():
    cfg = train.read_config(["kd_loss.temperature=3.5", "batch_size=1"])
    assert cfg.kd_loss.temperature == 3.5 and cfg.batch_size == 1
    assert cfg.model.num_layers == 15 and cfg.kd_ratio == 1.0  # the student that the demo makes, by distillation alone


@pytest.mark.slow
def test_the_command_is_tune_of_this_environment():
    command = train.tune_command(train.TRAINING, ["batch_size=1"])
    assert command[-5:] == ["run", train.TRAINING, "--config", train.CONFIG, "batch_size=1"]
    listing = subprocess.run([*command[:-5], "ls"], capture_output=True, text=True, check=True, timeout=120).stdout
    assert all(name in listing for name in (train.TRAINING, train.CACHING, train.CONFIG))
