"""A teacher that runs beside the student, and one that ran once: tokens per second, memory, reading and writing.

    python -m benchmarks.teachers

The pair and the data of ``benchmarks.recipe``: SmolLM2-135M-Instruct, 30 layers -> 15 of them, rows of exactly 256
tokens, 4 a batch, bf16 on the CPU, forward KL at T = 1 with kd_ratio 0.5; students with all weights and with LoRA.
Each run is a process of its own, and the sides take turns. A step's time comes from the recipe's own log; the first
step of a run is left out. Memory is the resident set before training, with everything loaded, and its high-water mark
during training.

Reading is measured apart: all batches by ``CacheReader``, once after the kernel was asked to drop the files from its
page cache (``posix_fadvise``) and once more, in wall and in CPU time; its share is of the CPU time of a training
step.

What a lighter teacher says is compared with what the same one says in fp32: a live one in bf16, one whose layers are
held in 8 bits, and one in bf16 whose states were stored in int8.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from torchtune_kd.cache_teacher import read_request, write_cache
from torchtune_kd.cache_teacher.error import error_of
from torchtune_kd.caches.layout import SHARDS
from torchtune_kd.caches.reader import CacheReader
from torchtune_kd.caches.states import channel_rms, decode, encode
from torchtune_kd.config.reading import read_config
from torchtune_kd.data.datasets import build_dataset
from torchtune_kd.data.documents import documents_in_sample
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import exit_with_message
from torchtune_kd.losses.signals import Head
from torchtune_kd.models.output_head import output_head
from torchtune_kd.teachers.live import build_teacher
from torchtune_kd.tools import fetch_smollm2, prune_checkpoint, select_layers
from torchtune_kd.training.signals import StopRequests

from ._measure import describe_machine
from .recipe import BATCH, make_config, run, write_rows

CACHES = {
    "hidden bf16": {"dtype": "bf16"},
    "hidden int8": {"dtype": "int8"},
    "top 64": {"kind": "top_k", "k": 64, "temperatures": [1.0]},
    "50 draws": {"kind": "sampled", "samples": 50},
}
STUDENTS = {
    "all weights": {"_component_": "torchtune_kd.models.smollm2.smollm2_135m", "num_layers": 15},
    "LoRA": None,  # as make_config has it
}
CPU = World(torch.device("cpu"))
GIB = 2**30


def write(name: str, cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Write a cache by the recipe's own writer; return its bytes and seconds."""
    request = read_request(OmegaConf.merge(cfg, {"cache": {"folder": str(folder / name), **CACHES[name]}}))
    begin = time.perf_counter()
    manifest = write_cache(request, CPU, StopRequests())
    seconds = time.perf_counter() - begin
    size = sum(file.stat().st_size for file in (folder / name / SHARDS).iterdir())
    return {"tokens": manifest.tokens, "bytes": size, "seconds": seconds, "error": manifest.error}


def samples(cfg: DictConfig) -> list[Any]:
    """Read the rows of the run's data."""
    config = read_config(cfg)
    dataset = build_dataset(config.dataset, "dataset", config.tokenizer.build(), 10**6, 10**6, CPU)
    return [dataset[row] for row in range(len(dataset))]


def batches(cfg: DictConfig) -> list[list[Any]]:
    """Cut the rows into the documents of each batch of the run."""
    rows = [documents_in_sample(sample) for sample in samples(cfg)]
    return [list(itertools.chain(*rows[begin : begin + BATCH])) for begin in range(0, len(rows), BATCH)]


def states(cfg: DictConfig, tokens: Tensor, **keys: str) -> tuple[Tensor, Head]:
    """Return the last hidden states [n, D] of the config's teacher with other keys, and its head."""
    teacher = build_teacher(read_config(OmegaConf.merge(cfg, keys)), CPU)
    found = torch.cat([teacher(rows) for rows in tokens.split(BATCH)])
    return found[:, :-1].flatten(0, 1), Head(*output_head(teacher.decoder))


def errors(cfg: DictConfig) -> Iterator[tuple[str, dict[str, float]]]:
    """Compare lighter teachers with the same one in fp32, on all tokens that have a next one."""
    tokens = torch.stack([torch.as_tensor(sample["tokens"]) for sample in samples(cfg)])
    labels = tokens[:, 1:].flatten()
    exact, head = states(cfg, tokens, dtype="fp32")
    in_bf16, _ = states(cfg, tokens)
    rms = channel_rms(in_bf16)
    yield "bf16", error_of(exact, in_bf16, labels, head)
    yield "int8 cache", error_of(exact, decode(encode(in_bf16, "int8", rms), torch.bfloat16, rms), labels, head)
    in_8_bits, _ = states(cfg, tokens, teacher_weights="int8")  # NF4 takes none of this model's layers
    yield "int8 weights", error_of(exact, in_8_bits, labels, head)


def reading(folder: Path, documents: Sequence[list[Any]]) -> Iterator[tuple[str, dict[str, float]]]:
    """Read all batches with cold and with warm page cache: milliseconds a batch, wall and CPU."""
    for state in ("cold", "warm"):
        reader = CacheReader(folder)
        if state == "cold":
            for file in (folder / SHARDS).iterdir():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
        wall, cpu = time.perf_counter(), time.process_time()
        for batch in documents:
            reader.read(batch).columns()
        count = len(documents) / 1e3
        yield state, {"wall_ms": (time.perf_counter() - wall) / count, "cpu_ms": (time.process_time() - cpu) / count}


def train(name: str, student: str, folder: Path, cfg: DictConfig) -> dict[str, float]:
    """Train once; return median tokens a second, memory, CPU seconds a step."""
    cfg = OmegaConf.merge(cfg, {})
    if STUDENTS[student] is not None:
        cfg.model = STUDENTS[student]
    if name != "live":
        cfg.merge_with({"teacher_model": None, "teacher_checkpointer": None, "teacher_cache": str(folder / name)})
    found = run("ours", folder, cfg)
    measured = json.loads((folder / "ours.json").read_text())
    return {
        "tokens_per_second": found["tokens_per_second"],
        "loaded": measured["loaded"],
        "peak": measured["peak"],
        "cpu_seconds": measured["cpu_seconds"] / cfg.max_steps_per_epoch,
    }


@exit_with_message()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.teachers", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps per run, the first left out (default 6)")
    parser.add_argument("--output", type=Path, help="write all numbers as JSON")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.steps < 2:
        parser.error("expected --rounds of at least 1 and --steps of at least 2")

    machine = describe_machine()
    print(machine)
    teacher = fetch_smollm2()
    report: dict[str, Any] = {"machine": machine, "written": {}, "reading": {}, "training": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prune_checkpoint(teacher, folder / "student", select_layers(30, 15, "even"))
        write_rows(folder / "rows.jsonl", BATCH * args.steps)
        cfg = make_config("ours", folder, teacher, folder / "student", args.steps)
        documents = batches(cfg)
        report["errors"] = dict(errors(cfg))
        for name in CACHES:
            report["written"][name] = write(name, cfg, folder)
            report["reading"][name] = dict(reading(folder / name, documents))
        for student in STUDENTS:
            sides: dict[str, list[dict[str, float]]] = {name: [] for name in ("live", *CACHES)}
            for index in range(args.rounds):
                order = list(sides) if index % 2 == 0 else list(sides)[::-1]
                for name in order:
                    sides[name].append(train(name, student, folder, cfg))
            report["training"][student] = sides
    print_report(report)
    if args.output:
        args.output.write_text(json.dumps(report, indent=2))


def print_report(report: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"\n{'teacher':14}{'KL to fp32, nats':>18}{'largest':>10}{'other top id':>14}{'gradient off by':>17}")
    for name, error in report["errors"].items():
        kl, most, other, gradient = (error[key] for key in ("kl_mean", "kl_max", "top1_changed", "gradient_error"))
        print(f"{name:14}{kl:18.2g}{most:10.2g}{other:14.2%}{gradient:17.2%}")
    print(f"\n{'cache':14}{'B a token':>11}{'written/s':>11}{'read, ms a batch: cold':>24}{'warm':>8}{'CPU':>8}")
    for name, written in report["written"].items():
        cold, warm = (report["reading"][name][state] for state in ("cold", "warm"))
        each, rate = written["bytes"] / written["tokens"], written["tokens"] / written["seconds"]
        print(f"{name:14}{each:11.0f}{rate:11.0f}{cold['wall_ms']:24.2f}{warm['wall_ms']:8.2f}{warm['cpu_ms']:8.2f}")
    for student, sides in report["training"].items():
        middle = {name: {key: median(run[key] for run in runs) for key in runs[0]} for name, runs in sides.items()}
        live = middle["live"]["tokens_per_second"]
        print(f"\n{student:14}{'tokens/s':>10}{'speed':>8}{'loaded GiB':>12}{'peak GiB':>10}{'read, of CPU time':>19}")
        for name, found in middle.items():
            speed, share = found["tokens_per_second"], ""
            if name != "live":
                share = f"{report['reading'][name]['warm']['cpu_ms'] / 10 / found['cpu_seconds']:.2f} %"
            memory = f"{found['loaded'] / GIB:12.2f}{found['peak'] / GIB:10.2f}"
            print(f"{name:14}{speed:10.1f}{speed / live:7.2f}x{memory}{share:>19}")


if __name__ == "__main__":
    main()
