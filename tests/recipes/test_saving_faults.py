"""Checkpoints that cannot be written or read as usual: what is lost (nothing), and the one sentence that says so."""

import json
import shutil
import threading
from dataclasses import asdict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf

import torchtune_kd.checkpoints.writer as snapshots
from helpers.forked import ForkedRun
from helpers.resumable import assert_same_run, resumable_config
from helpers.tiny import run_in_process
from torchtune_kd.checkpoints.folders import step_folders
from torchtune_kd.checkpoints.writer import SnapshotWriter
from torchtune_kd.distributed.world import World
from torchtune_kd.storage.manifest import Damaged, Manifest
from torchtune_kd.storage.manifest import _checksum as checksum
from torchtune_kd.training import UserError


def manifest(step):
    return Manifest(
        progress={"global_step": step}, seed=0, processes=2, identity={}, config={}, versions={}, saved_at="now"
    )


class Meeting:
    """Two threads, each a rank that sees its own file system: what they gather, and the files that a save writes."""

    def __init__(self):
        self.barrier, self.values = threading.Barrier(2, timeout=20), [None, None]

    def gather(self, world, value):
        self.values[world.rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


def save_on_two(monkeypatch, outputs, steps):
    """Return whether each rank's saves succeed, and what is said; each writes one file into its ``outputs``."""
    meeting, said, good = Meeting(), [], [[], []]
    monkeypatch.setattr(World, "gather", lambda world, value: meeting.gather(world, value))
    monkeypatch.setattr(World, "barrier", lambda world: meeting.gather(world, None))

    def write_own(state, storage_writer, **_):
        folder = storage_writer.path
        folder.mkdir(exist_ok=True, parents=True)
        (folder / f"__{state['rank']}_0.distcp").write_bytes(bytes(100))

    monkeypatch.setattr(dcp, "save", write_own)

    def rank_main(rank):
        world = World(device=torch.device("cpu"), rank=rank, size=2, sharded=True)
        writer = SnapshotWriter(
            outputs[rank],
            world,
            previous_run=[],
            keep_last_n=1,
            is_better=None,
            in_background=False,
            say=said.append,
            announce=lambda event: None,
        )
        for step in steps:
            writer.write({"rank": rank}, manifest(step))
            good[rank].append(writer.finish())

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return good, said


def test_an_output_folder_that_nodes_do_not_share_fails_every_save(tmp_path, monkeypatch):
    outputs = [tmp_path / "a" / "out", tmp_path / "b" / "out"]
    good, said = save_on_two(monkeypatch, outputs, [2, 4])
    assert good == [[False, False], [False, False]]
    assert said[0] == (
        f"warning: the checkpoint {outputs[0]}/step_2 could not be written (`output_dir` is not the same folder on "
        f"every node: on rank 0's {outputs[0]}/step_2.partial lacks __1_0.distcp, which rank 1 has written; put "
        "`output_dir` on a file system that all nodes share): the run goes on, and the checkpoint before it stays "
        "the last."
    )
    assert len(said) == 2
    assert not [path for output in outputs for path in output.iterdir()]  # nor does a node keep what it wrote


def test_one_that_they_share_holds_what_all_have_written(tmp_path, monkeypatch):
    good, said = save_on_two(monkeypatch, [tmp_path, tmp_path], [2, 4])
    assert good == [[True, True], [True, True]] and not said
    (folder,) = step_folders(tmp_path)
    found = Manifest.read(folder)
    assert folder.name == "step_4" and sorted(found.files) == ["__0_0.distcp", "__1_0.distcp"]
    found.check_files(folder, found.files)


@pytest.mark.parametrize("what", [{"resume_from_checkpoint": True}, {"save_every_n_steps": 2}])
def test_a_run_whose_processes_see_different_folders_does_not_begin(tmp_path, what):
    cfg = resumable_config(
        tmp_path, save_every_n_steps=None, output_dir=str(tmp_path / "node_${oc.env:RANK,0}" / "out")
    )
    (tmp_path / "node_0").mkdir()
    run = ForkedRun(OmegaConf.merge(cfg, what), 2)
    assert run.join() == [2, 2]
    for rank in (0, 1):
        assert f"what rank 0 writes into {tmp_path}/node_{rank}/out is not there for rank 1: put it" in run.output(rank)
    assert not list((tmp_path / "node_0" / "out").glob(".seen*"))


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    cfg = resumable_config(tmp_path, output_dir=str(tmp_path / "file" / "out"))
    cfg.metric_logger.log_dir = str(tmp_path / "logs")
    run = ForkedRun(OmegaConf.merge(cfg, {"output_dir": str(tmp_path / "file")}), 2)
    assert run.join() == [2, 2]
    assert f"Expected `output_dir` to be a folder that can be written, got {tmp_path}/file: " in run.output(1)


# --- copies in host memory


@pytest.mark.slow
def test_an_8_bit_optimizer_is_saved_in_the_background(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # torchao compiles its optimizer, for minutes
    optimizer = {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3}
    undisturbed = resumable_config(tmp_path, output_dir=str(tmp_path / "undisturbed"), dtype="bf16")
    cfg = resumable_config(tmp_path, enable_async_checkpointing=True, dtype="bf16", keep_last_n=9)
    undisturbed.optimizer, cfg.optimizer = optimizer, optimizer
    run_in_process(undisturbed)
    run_in_process(cfg)
    for folder in step_folders(tmp_path / "out"):  # what is after step 6 goes, as if the run had been killed then
        if int(folder.name.removeprefix("step_")) > 6:
            shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "out" / "epoch_1")
    run_in_process(OmegaConf.merge(cfg, {"resume_from_checkpoint": True}))
    assert_same_run(cfg, undisturbed)


@pytest.mark.slow
def test_shards_are_saved_in_the_background(tmp_path):
    undisturbed = resumable_config(
        tmp_path, batch_size=2, keep_last_n=9, enable_async_checkpointing=True, output_dir=str(tmp_path / "undisturbed")
    )
    ForkedRun(undisturbed, 2).finish()
    after_6 = shutil.ignore_patterns("step_8", "step_1?", "epoch_1")
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "out", ignore=after_6)
    cfg = OmegaConf.merge(undisturbed, {"output_dir": str(tmp_path / "out"), "resume_from_checkpoint": True})
    assert "step 6" in ForkedRun(cfg, 2).finish()
    assert_same_run(cfg, undisturbed)


def test_a_copy_shares_no_memory_whatever_the_type():
    from torchao.optim.subclass_8bit import OptimState8bit

    plain, state = torch.randn(4, 256).t(), OptimState8bit.zeros((4, 256))
    copies = snapshots.host_copy(plain), snapshots.host_copy(state)
    expected = plain.clone(), state.dequantize().clone()
    plain.zero_()
    state.copy_(torch.ones(4, 256))
    assert torch.equal(copies[0], expected[0]) and copies[0].stride() == expected[0].stride()
    assert type(copies[1]) is OptimState8bit and torch.equal(copies[1].dequantize(), expected[1])


def test_no_room_for_the_copy_fails_the_save_and_not_the_run(tmp_path, monkeypatch, capfd):
    cfg = resumable_config(tmp_path, enable_async_checkpointing=True, keep_last_n=9)
    write, copied = SnapshotWriter.write, snapshots.host_copy

    def fail(tensor):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    def write_but_4(self, state, manifest):
        monkeypatch.setattr(snapshots, "host_copy", fail if manifest.progress["global_step"] == 4 else copied)
        write(self, state, manifest)

    monkeypatch.setattr(SnapshotWriter, "write", write_but_4)
    run_in_process(cfg)
    message = capfd.readouterr().err
    assert (
        f"warning: the checkpoint {tmp_path}/out/step_4 could not be written (its copy in host memory: "
        "DefaultCPUAllocator: can't allocate memory): the run goes on" in message
    )
    assert "step_4" not in [folder.name for folder in step_folders(tmp_path / "out")]
    assert "Traceback" not in message and (tmp_path / "out" / "step_6").is_dir()


# --- going on with it


@pytest.fixture
def interrupted(tmp_path):
    """The config that goes on with a run that ended before its last export."""
    cfg = resumable_config(tmp_path, epochs=1)
    run_in_process(cfg)
    shutil.rmtree(tmp_path / "out" / "epoch_0")
    return OmegaConf.merge(cfg, {"resume_from_checkpoint": True})


def test_a_log_that_finds_no_room_is_left_as_it_is(tmp_path, interrupted):
    log = tmp_path / "out" / "logs" / "log.txt"
    before = log.read_text()
    shorter = log.with_name("log.txt.partial")
    shorter.symlink_to("/dev/full")
    with pytest.raises(UserError, match=rf"The log {log} could not be cut to .* \(.*No space left.*\): make room"):
        run_in_process(interrupted)
    assert log.read_text() == before and not shorter.is_symlink()
    run_in_process(interrupted)
    assert (tmp_path / "out" / "epoch_0").is_dir()


def test_the_progress_of_another_version_is_refused_and_nothing_renamed(tmp_path, interrupted):
    folder = step_folders(tmp_path / "out")[0]
    found = Manifest.read(folder)
    found.progress["rows"] = found.progress.pop("samples")
    found.versions["torchtune_kd"] = "0.0.7"
    found.write(folder)
    with pytest.raises(UserError, match=rf"{folder} was written by torchtune_kd 0.0.7.*\(without samples, with rows\)"):
        run_in_process(interrupted)
    assert folder.is_dir()


def test_a_manifest_with_the_fields_of_another_version_is_not_read(tmp_path):
    content = asdict(manifest(2)) | {"more": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(content | {"checksum": checksum(content)}))
    with pytest.raises(Damaged, match="has the fields of another version"):
        Manifest.read(tmp_path)
