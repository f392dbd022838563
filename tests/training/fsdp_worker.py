"""Run by torchrun: one optimizer step of three microbatches; writes what rank 0 sent over the wire."""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

import torchtune_kd.training as kd
from torchtune_kd.kernels import METRICS


class CountCollectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


cfg = OmegaConf.load(sys.argv[1])
settings = kd.read_settings(cfg, distributed=True)
world = kd.join_process_group("cpu")
loss = kd.build_kd_loss(cfg)
teacher = kd.build_teacher(cfg, settings, world)
_, weights = kd.load_weights(cfg.checkpointer, "checkpointer")
student = kd.build_student(cfg, settings, world, loss, weights, seed=0)

tokens = torch.arange(3, 35).view(2, 16) + world.rank
step = [{"tokens": tokens, "labels": tokens.roll(-1, dims=1)}] * 3
with CountCollectives() as collectives:
    kd.accumulate_gradients(student, teacher, step, METRICS, loss.ignore_index, world)
if world.is_rank_zero:
    Path(sys.argv[2]).write_text(json.dumps(collectives.counts))
del student, teacher
kd.leave_process_group()
