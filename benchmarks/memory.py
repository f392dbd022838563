"""Memory that the shipped configs need per device: ``python -m benchmarks.memory [CONFIG ...]``.

Nothing is loaded, trained or measured: the figures are those of ``tune run torchtune_kd/plan``, in one line a
config. The heads of configs/**/*.yaml hold them; ``--write`` puts them there.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from torchtune_kd.plan import Memory, build_models, fits, plan_memory, read_request
from torchtune_kd.plan.memory import GIB
from torchtune_kd.plan.meta_models import weight_bytes
from torchtune_kd.plan.request import SEQUENCE

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
HEADER = "# Memory per device"
GPUS = (12, 16, 24, 32, 40, 48, 80, 141, 192)  # GB, as they are sold
PARTS = ("teacher weights", "student weights", "gathered", "gradients", "optimizer", "activations", "loss", "temporary")
METHOD = """\
Computed, not measured: GiB per device at the highest point of a step, for P processes with B sequences of S tokens.
teacher, student  weights and tables as they are held, NF4 with its scales. kd_distributed: 1/P of the weights.
gathered          what FSDP2 holds beside them: embedding, norm and head, two layers, a layer's gradients in transit.
fits              the smallest GPU (GB) of which 90 % hold the total and 1 GiB for the CUDA context.
host              the larger checkpoint, read into host memory; with kd_distributed once per node.
"""


@dataclass(frozen=True)
class Estimate:
    """A config's memory on each of ``processes`` devices, and in its host."""

    processes: int
    batch: int
    sequence: int
    on_gpu: bool
    memory: Memory
    host: int

    @property
    def fits(self) -> str:
        total = self.memory.total
        if total is None or not self.on_gpu:
            return "?" if self.on_gpu else "CPU"
        return next((f"{gb} GB" for gb in GPUS if fits(total, gb * GIB)), f"> {GPUS[-1]} GB")

    def part(self, *names: str) -> int | None:
        """Bytes of these parts at the highest point; None if the optimizer's state is among them and not known."""
        if "optimizer" in names and self.memory.optimizer is None:
            return None
        return sum(self.memory.at_peak.get(name, 0) for name in names)

    def header(self) -> str:
        """The line of a config's head."""
        several = self.processes > 1
        return (
            f"{HEADER} (computed by `tune run torchtune_kd/plan`, not measured; {self.processes} "
            f"process{'es' * several}, {self.batch} x {self.sequence} tokens): "
            f"weights {_gib(self.part('teacher weights', 'student weights', 'gathered'))} GiB, "
            f"gradients and optimizer {_gib(self.part('gradients', 'optimizer'))} GiB, "
            f"loss {_gib(self.part('loss'))} GiB, activations {_gib(self.part('activations', 'temporary'))} GiB, "
            f"together {_gib(self.memory.total)} GiB: "
            + (f"one {self.fits} GPU{' each' * several}, " if self.on_gpu else "a CPU, ")
            + f"with {_gib(self.host)} GiB of host memory{' per node' * several} to read the checkpoints"
        )


def estimate(path: str | Path, processes: int = 2) -> Estimate:
    """The memory of the run that the config file at ``path`` describes.

    Args:
        path (str | Path): a config of ``kd_single_device`` or ``kd_distributed``.
        processes (int): P of ``kd_distributed``; ``kd_single_device`` has one.

    Raises:
        UserError: if the config or one of its models cannot be built.
    """
    cfg = OmegaConf.load(path)
    if Path(path).stem.endswith("_distributed"):
        cfg.devices = processes
    _, config, layout = read_request(cfg)
    settings = config.settings
    models = build_models(config, layout.shards)
    sequence = config.tokenizer.get("max_seq_len") or SEQUENCE
    memory, _ = plan_memory(config, models, layout, sequence)
    teachers = (teacher.model for teacher in models.others)
    return Estimate(
        processes=layout.processes,
        batch=settings.batch_size,
        sequence=sequence,
        on_gpu=settings.torch_device.type == "cuda",
        memory=memory,
        host=max(map(weight_bytes, (models.student, *teachers))),
    )


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / GIB:.1f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", type=Path, help="YAML files; all under configs/ if none is given")
    parser.add_argument("--processes", type=int, default=2, help="P of the kd_distributed configs (2)")
    parser.add_argument("--write", action="store_true", help="write the figures into the heads of the files")
    options = parser.parse_args(argv)
    print(METHOD)
    names = [name.partition(" ")[0] for name in PARTS] + ["total", "fits", "host"]
    print(f"{'config':44}{'P':>3}{'B x S':>9}" + "".join(f"{name:>12}" for name in names))
    for path in options.configs or sorted(CONFIGS.rglob("*.yaml")):
        e = estimate(path, options.processes)
        cells = [*(_gib(e.part(name)) for name in PARTS), _gib(e.memory.total), e.fits, _gib(e.host)]
        where = f"{path.parent.name}/{path.stem}"
        print(f"{where:44}{e.processes:3}{f'{e.batch} x {e.sequence}':>9}" + "".join(f"{c:>12}" for c in cells))
        if options.write:
            path.write_text(re.sub(f"^{HEADER}.*$", e.header(), path.read_text(), count=1, flags=re.MULTILINE))


if __name__ == "__main__":
    main()
