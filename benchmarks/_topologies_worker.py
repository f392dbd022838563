"""Run by torchrun for ``benchmarks.topologies``: ten steps over the same tokens on however many processes."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

import torchtune_kd.training as kd
from torchtune_kd.checkpoints.export import full_state_dict
from torchtune_kd.models.build import build_student
from torchtune_kd.teachers.live import build_teacher
from torchtune_kd.training.step import gradient_norm

ROWS, LENGTH, VOCABULARY, STEPS = 12, 24, 384, 10  # rows of a step divide by 1, 2, 3 and 4 processes
SIZES = {"num_heads": 4, "num_kv_heads": 4, "embed_dim": 256, "intermediate_dim": 256}  # NF4 holds quarters of them
LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 4, "lora_alpha": 8}


def config(kind: str, replicate_dim: int) -> DictConfig:
    """A whole config; models have random weights, and data comes from :func:`batches`."""
    model = {"vocab_size": VOCABULARY, "max_seq_len": 64, "scale_factor": 1, **SIZES}
    builder = "torchtune.models.llama3_2.llama3_2"
    student = {"_component_": builder, **model, "num_layers": 2}
    if kind != "full":
        student |= LORA | {"use_dora": kind == "dora", "quantize_base": kind == "qlora"}
        student["_component_"] = "torchtune.models.llama3_2.lora_llama3_2"
    unused = {"_component_": "builtins.dict"}
    return OmegaConf.create(
        {
            "output_dir": "unused",
            "device": "cpu",
            "dtype": "fp32",
            "seed": 1,
            "random_weights": True,
            "checkpointer": None,
            "teacher_checkpointer": None,
            "model": student,
            "teacher_model": {"_component_": builder, **model, "num_layers": 2, "tie_word_embeddings": False},
            "tokenizer": unused,
            "dataset": unused,
            "metric_logger": unused,
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
            "kd_loss": {"_component_": "torchtune_kd.losses.ForwardKLLoss", "temperature": 2.0},
            "kd_ratio": 0.5,
            "clip_grad_norm": 1.0,
            "data_parallel_replicate_dim": replicate_dim,
        }
    )


def batches(step: int, rank: int, size: int, ignore_index: int) -> list[kd.Batch]:
    """This process's two microbatches of a step.

    The valid tokens of a row are 0 to ``LENGTH`` many, of the last three rows none: the last process has a microbatch
    without any, and of four it has nothing but such.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    lengths = torch.randint(LENGTH + 1, (ROWS, 1), generator=generator)
    lengths[-3:] = 0
    labels = tokens[:, 1:].masked_fill(torch.arange(LENGTH) >= lengths, ignore_index)
    mine = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    pairs = zip(tokens[mine, :-1].chunk(2), labels[mine].chunk(2), strict=True)
    return [kd.Batch(t, l) for t, l in pairs]


def train(config: kd.Config, world: kd.World) -> Iterator[dict[str, float]]:
    """Loss and gradient norm of each step; at last, on rank 0, the student's weights before and after."""
    loss = config.kd_loss.build()
    teacher = build_teacher(config, world)
    student = build_student(config.model, config.settings, world, loss, None, seed=1)
    start = full_state_dict(student.decoder, world)
    trainable = [p for p in student.parameters() if p.requires_grad]
    optimizer = config.optimizer.build(trainable)
    for number in range(STEPS):
        microbatches = batches(number, world.rank, world.size, loss.ignore_index)
        step = kd.Step(student, microbatches, (), loss.ignore_index, world)
        for batch in step:
            step.backward(*student(batch, teacher.signal(batch), ()))
        teacher.end_step(student)
        norm = gradient_norm(trainable, config.settings.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        mean = world.sum(step.sums["loss"]) / world.sum(step.sums["num_tokens"])
        yield {"loss": float(mean), "grad_norm": float(norm)}
    yield {"start": start, "weights": full_state_dict(student.decoder, world)}


def main(folder: str, *runs: str) -> None:
    """``runs`` are ``kind:replicate_dim``; rank 0 writes ``<kind>-<replicate_dim>.safetensors`` for each."""
    for run in runs:
        kind, replicate_dim = run.split(":")
        read = kd.read_config(config(kind, int(replicate_dim)), distributed=True)
        if kind == "qlora" and os.environ["WORLD_SIZE"] == "1":
            world = kd.World(torch.device("cpu"))  # FSDP2 shards NF4 over two or more
        else:
            world = kd.join_world(read.settings)
        *steps, last = train(read, world)
        if world.is_rank_zero:
            numbers = {name: torch.tensor([step[name] for step in steps], dtype=torch.float64) for name in steps[0]}
            weights = {f"{when}.{name}": w.clone() for when, state in last.items() for name, w in state.items()}
            save_file(numbers | weights, Path(folder) / f"{kind}-{replicate_dim}.safetensors")
    kd.leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
