"""The shipped launch files do what they say: the SLURM script under a stand-in for SLURM, the manifest as it reads."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import torchtune_kd
from helpers.tiny import ROWS, make_config
from torchtune_kd.config.settings import Settings
from torchtune_kd.launch.__main__ import main

FOLDER = Path(torchtune_kd.__file__).parent / "launch"
SLURM = FOLDER / "kd_multinode.slurm"
MANIFEST = FOLDER / "kd_pytorchjob.yaml"

# What the script asks of SLURM: start a command once per node, signal what runs, name nodes, requeue.
SRUN = """
command = sys.argv[sys.argv.index("bash"):]
Path(state, "srun.pid").write_text(str(os.getpid()))
Path(state, "cpus").write_text(os.environ.get("SRUN_CPUS_PER_TASK", "1"))  # as srun does it from 22.05 on
nodes = range(int(os.environ["SLURM_NNODES"]))
tasks = [subprocess.Popen(command, env=os.environ | {"SLURM_NODEID": str(node)}) for node in nodes]
while None in (codes := [task.poll() for task in tasks]):
    if any(codes):  # --kill-on-bad-exit
        for task in tasks:
            task.terminate()
    time.sleep(0.1)
sys.exit(max(codes))
"""
SCANCEL = """
assert sys.argv[1:] == ["--signal=USR1", os.environ["SLURM_JOB_ID"]]
for process in psutil.Process(int(Path(state, "srun.pid").read_text())).children(recursive=True):
    process.send_signal(signal.SIGUSR1)
"""
SCONTROL = """
print("localhost" if sys.argv[1] == "show" else "")
if sys.argv[1] == "requeue":
    Path(state, "requeued").write_text(sys.argv[2])
"""


def stand_in(folder: Path) -> dict[str, str]:
    """Programs of SLURM's names in ``folder``, and the environment in which they are found."""
    folder.mkdir(exist_ok=True)
    for name, body in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        imports = "import os, signal, subprocess, sys, time\nfrom pathlib import Path\nimport psutil\n"
        (folder / name).write_text(f"#!{sys.executable}\n{imports}state = {str(folder)!r}\n{body}")
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "PROCESSES": "1"}
    job["SLURM_CPUS_PER_TASK"] = "64"
    return os.environ | job | {"PATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def start(folder: Path, *overrides: str, **more: str) -> subprocess.Popen:
    cfg = make_config(folder, rows=ROWS * 10, batch_size=2, epochs=50)
    OmegaConf.save(cfg, folder / "config.yaml")
    return subprocess.Popen(
        ["bash", str(SLURM), str(folder / "config.yaml"), *overrides],
        env=stand_in(folder / "slurm") | more,
        cwd=folder,
        stdout=(folder / "job.out").open("w"),
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
def test_a_job_whose_time_is_up_writes_a_checkpoint_and_is_requeued(tmp_path):
    """Two nodes of one process; an override on the script's command line comes after the script's own."""
    job = start(tmp_path, "save_every_n_steps=10")
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "step_10").is_dir():
        assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "job.out").read_text()[-4000:]
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 0
    output = (tmp_path / "job.out").read_text()
    step = re.search(r"SIGUSR1 ended the run after step (\d+)", output)
    assert step, output[-4000:]
    assert (tmp_path / "out" / f"step_{step.group(1)}").is_dir()
    assert "the job goes back into the queue" in output
    assert (tmp_path / "slurm" / "requeued").read_text() == str(os.getpid())


@pytest.mark.heavy
def test_a_job_that_fails_is_tried_again_and_then_ends_with_its_code(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "tune").write_text("#!/bin/bash\nexit 7\n")
    (tmp_path / "slurm" / "tune").chmod(0o755)
    job = start(tmp_path, RESTARTS="1")
    assert job.wait(60) == 7
    output = (tmp_path / "job.out").read_text()
    assert [f"attempt {n} ended with 7" in output for n in range(3)] == [True, True, False]
    assert not (tmp_path / "slurm" / "requeued").exists()
    assert (tmp_path / "slurm" / "cpus").read_text() == "64"  # what the job asked for reaches the workers


@pytest.mark.slow
def test_a_mistake_in_the_config_is_said_once_and_not_tried_again(tmp_path):
    job = start(tmp_path, "batch_sise=4")
    assert job.wait(120) == 2
    output = (tmp_path / "job.out").read_text()
    sentence = "Unknown key `batch_sise` in the config: did you mean `batch_size`?"
    assert output.count(f"error: {sentence}") == 1
    assert output.endswith(f"kd_multinode: not tried again: {sentence}\n")
    assert not list(tmp_path.glob("*.mistake"))


def commands() -> dict[str, str]:
    """The command lines of ``tune run`` in all that is shipped, with what a shell would put in left in."""
    pods = yaml.safe_load(MANIFEST.read_text())["spec"]["pytorchReplicaSpecs"]
    readme = (Path(__file__).parents[2] / "torchtune_kd" / "launch" / "README.md").read_text()
    script = re.search(r"exec (tune run.*?\"\$@\")'", SLURM.read_text(), re.DOTALL).group(1)
    by_hand = re.search(r"^    (tune run.*?resume_from_checkpoint=True)$", readme, re.DOTALL | re.MULTILINE).group(1)
    manifest = pods["Master"]["template"]["spec"]["containers"][0]["command"][2].removeprefix("exec ")
    return {"script": script, "manifest": manifest, "by hand": by_hand}


@pytest.mark.parametrize("name", ["script", "manifest", "by hand"])
def test_every_command_is_one_that_tune_and_the_recipe_understand(name):
    from torch.distributed.run import get_args_parser

    words = shlex.split(re.sub(r"\$\(.*?\)\"", 'true"', commands()[name].replace("\\\n", " ")))
    assert words[:2] == ["tune", "run"]
    words = [re.sub(r"^\$(SLURM_NNODES|PROCESSES|NODES)$", "2", word) for word in words]
    arguments = get_args_parser().parse_args(words[2:])
    assert (arguments.nnodes, arguments.rdzv_backend) == ("2", "c10d")
    assert arguments.training_script == "torchtune_kd/kd_distributed"
    keys = {word.partition("=")[0] for word in arguments.training_script_args if "=" in word}
    assert keys == {"data_parallel_replicate_dim", "save_every_n_steps", "resume_from_checkpoint"}
    assert keys <= set(Settings.__dataclass_fields__)


def test_the_manifest_starts_the_same_pod_on_every_node():
    job = yaml.safe_load(MANIFEST.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    (container,) = replicas["Worker"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert container["name"] == "pytorch"  # the operator looks for it
    assert int(environment["NODES"]) == replicas["Master"]["replicas"] + replicas["Worker"]["replicas"]
    assert int(environment["PROCESSES"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    grace = replicas["Worker"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in replicas["Worker"]["template"]["spec"]["volumes"]}


def test_the_files_are_copied_and_replace_nothing(tmp_path, capsys):
    main([str(tmp_path)])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        path.name: path.read_text() for path in (SLURM, MANIFEST)
    }
    for folder, said in ((tmp_path, "is there already"), (tmp_path / "nowhere", "expected an existing folder")):
        with pytest.raises(SystemExit) as ended:
            main([str(folder)])
        assert ended.value.code == 2 and said in capsys.readouterr().err
