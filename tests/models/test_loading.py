"""What the processes of a node learn from the one that reads."""

import pytest

from helpers.forked import ForkedRun
from helpers.tiny import make_config


@pytest.mark.slow
def test_all_processes_say_that_files_cannot_be_read(tmp_path):
    """One of the two reads; the other does not wait for weights that never come."""
    cfg = make_config(tmp_path)
    file = tmp_path / "student" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    run = ForkedRun(cfg, 2)
    assert run.join(60) == [2, 2], run.output()
    for rank in range(2):
        assert f"error: The files of `checkpointer` in {tmp_path / 'student'} cannot be read" in run.output(rank)
