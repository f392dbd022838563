"""Run by torchrun: load both models, take one step of three microbatches; each rank writes what it saw.

``sharding_worker.py CONFIG FOLDER``: ``FOLDER/<rank>.json`` holds the collectives of the step by operation and group,
the order in which layers were gathered and computed, and what loading took.
"""

import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

import torchtune_kd.training as kd
from torchtune_kd.distributed.world import join_process_group
from torchtune_kd.kernels import METRICS
from torchtune_kd.models.build import build_student
from torchtune_kd.models.loading import load_weights
from torchtune_kd.teachers.live import build_teacher

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers.steps import accumulate

cfg = OmegaConf.load(sys.argv[1])
config = kd.read_config(cfg, distributed=True)
settings = config.settings
world = join_process_group(settings)
names = {world.mesh.get_group(i).group_name: name for i, name in enumerate(world.mesh.mesh_dim_names)}


class Collectives(TorchDispatchMode):
    """Counts them as ``operation group``, and notes the all-gathers, among the layers' forwards, in ``order``."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.order = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            operation = str(func).split(".")[1].strip("_")
            boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg))
            group = dist.ProcessGroup.unbox(boxed).group_name
            self.counts[f"{operation} {names.get(group, 'other')}"] += 1
            if "allgather" in operation:
                self.order.append("gather")
        return func(*args, **(kwargs or {}))


def anonymous_bytes() -> int:
    """Memory of this process alone that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


class Peak(threading.Thread):
    """The most that :func:`anonymous_bytes` rose above the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes, self.bytes, self.done = anonymous_bytes(), 0, False

    def run(self) -> None:
        while not self.done:
            self.bytes = max(self.bytes, anonymous_bytes() - self.start_bytes)
            time.sleep(0.001)


peak = Peak()
peak.start()
loss = config.kd_loss.build()
teacher = build_teacher(config, world)
peak.done = True
_, weights = load_weights(config.checkpointer, world)
maps_files = "model.safetensors" in Path("/proc/self/maps").read_text()
student = build_student(config.model, settings, world, loss, weights, seed=0)

tokens = torch.arange(3, 35).view(2, 16) + world.rank
step = [kd.Batch(tokens, tokens.roll(-1, dims=1))] * 3
with Collectives() as collectives:
    for index, layer in enumerate(teacher.decoder.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: collectives.order.append(f"compute {index}"))
    accumulate(student, teacher, step, METRICS, loss.ignore_index, world)
result = {
    "collectives": collectives.counts,
    "order": collectives.order,
    "peak": peak.bytes,
    "maps_files": maps_files,
    "node_size": dist.get_world_size(world.node_group),
}
Path(sys.argv[2], f"{world.rank}.json").write_text(json.dumps(result))
del student, teacher, layer  # every part of a sharded model
kd.leave_process_group()
