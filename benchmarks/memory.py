"""Memory that a run needs per device, computed from its config alone: ``python -m benchmarks.memory [CONFIG ...]``.

Nothing is loaded, trained or measured: both models are built on the meta device, which has shapes and dtypes but no
memory. The figures in the heads of configs/**/*.yaml come from here; ``--write`` puts them there.

Legend: B sequences of a microbatch, S their length, V vocabulary, D hidden width, L layers, P processes.
"""

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import training
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from torchtune_kd.kernels import Objective
from torchtune_kd.kernels._block import BlockLoss, Plan, rows_per_block
from torchtune_kd.kernels._linear import chunk_size
from torchtune_kd.models.output_head import output_head, skip_output_head
from torchtune_kd.training import Settings, UserError, World, build_kd_loss, read_settings
from torchtune_kd.training.metrics import training_metrics
from torchtune_kd.training.optim import build_optimizer
from torchtune_kd.training.preflight import on_meta

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
HEADER = "# Memory per device"
SEQUENCE = 512  # S where the tokenizer has no max_seq_len
GPUS = (12, 16, 24, 32, 40, 48, 80, 141, 192)  # GB, as they are sold
GIB = 2**30
COLUMNS = ("teacher", "student", "gradients", "optimizer", "loss", "activations", "total", "fits", "host")
METHOD = """\
Computed, not measured: GiB per device, for P processes with B sequences of S tokens each.
teacher, student  weights and tables as they are held, NF4 with its scales. kd_distributed: 1/P of the weights, and what
                  FSDP2 gathers at a time: embedding, norm and head, and two layers.
gradients         of what trains. kd_distributed: whole, since they are reduced in a step's last microbatch alone; with
                  gradient_accumulation_steps: 1 a share of them and the embedding's.
optimizer         what the optimizer keeps after a step over one small parameter, times what trains; 1/P of it.
loss              a chunk of logits of each model, the blocks that work on it, the gradients of hidden states and head.
activations       what autograd keeps of the student's forward, operation by operation and without S x S scores; with
                  checkpointing L inputs [B, S, D], and one layer where it needs more than the loss, whose memory is
                  free when layers are computed again. And the teacher's last hidden states [B, S, D].
fits              the smallest GPU (GB) of which 90 % hold the total and 1 GiB for the CUDA context.
host              the larger checkpoint, which every process reads into host memory.
"""


@dataclass(frozen=True)
class Estimate:
    """Bytes per device; ``optimizer`` is None where the state of that optimizer is not known."""

    processes: int
    batch: int
    sequence: int
    on_gpu: bool
    teacher: int
    student: int
    gradients: int
    optimizer: int | None
    loss: int
    activations: int
    host: int

    @property
    def total(self) -> int | None:
        if self.optimizer is None:
            return None
        return self.teacher + self.student + self.gradients + self.optimizer + self.loss + self.activations

    @property
    def fits(self) -> str:
        if self.total is None or not self.on_gpu:
            return "?" if self.on_gpu else "CPU"
        return next((f"{gb} GB" for gb in GPUS if self.total + GIB <= 0.9 * gb * GIB), f"> {GPUS[-1]} GB")

    def header(self) -> str:
        """The line of a config's head."""
        trained = None if self.optimizer is None else self.gradients + self.optimizer
        return (
            f"{HEADER} (computed by python -m benchmarks.memory, not measured; {self.processes} "
            f"process{'es' * (self.processes > 1)}, {self.batch} x {self.sequence} tokens): "
            f"weights {_gib(self.teacher + self.student)} GiB, gradients and optimizer {_gib(trained)} GiB, loss "
            f"{_gib(self.loss)} GiB, activations about {_gib(self.activations)} GiB, together {_gib(self.total)} GiB: "
            + (f"one {self.fits} GPU{' each' * (self.processes > 1)}, " if self.on_gpu else "a CPU, ")
            + f"with {_gib(self.host)} GiB of host memory{' per process' * (self.processes > 1)} "
            + "to read the checkpoints"
        )


def estimate(path: str | Path, processes: int = 2) -> Estimate:
    """The memory of the run that the config file at ``path`` describes.

    Args:
        path (str | Path): a config of ``kd_single_device`` or, by the ending of its name, of ``kd_distributed``.
        processes (int): P of ``kd_distributed``; ``kd_single_device`` has one.

    Raises:
        UserError: if the config or one of its models cannot be built.
    """
    cfg = OmegaConf.load(path)
    distributed = Path(path).stem.endswith("_distributed")
    settings = read_settings(cfg, distributed=distributed)
    device, settings = settings.torch_device, replace(settings, device="cpu")  # shapes need no GPU
    world = World(torch.device("cpu"), size=processes if distributed else 1, sharded=distributed)
    batch, sequence = settings.batch_size, cfg.tokenizer.get("max_seq_len") or SEQUENCE

    student = _student(cfg, settings, world)
    teacher = on_meta(cfg, "teacher_model", settings, world) if settings.uses_teacher else None
    heads = [output_head(model)[0] for model in (student, teacher) if model is not None]
    trainable = [p for p in student.parameters() if p.requires_grad]
    gradients = sum(map(_bytes, trainable))
    if distributed and settings.gradient_accumulation_steps == 1:
        gradients = gradients // world.size + _bytes(heads[0]) * heads[0].requires_grad
    state = optimizer_bytes_per_element(cfg, settings.torch_dtype)
    sizes = [model_bytes(model) for model in (student, teacher) if model is not None]

    plain = cfg
    if any(isinstance(p, NF4Tensor) for p in student.parameters()):  # NF4 cannot compute here and keeps nothing itself
        plain = OmegaConf.merge(cfg, {"model": {"quantize_base": False}})
    hidden = 0 if teacher is None else batch * sequence * heads[1].shape[1] * heads[1].element_size()
    kept, again = activation_bytes(_student(plain, settings, world), batch, sequence, settings)
    loss = loss_bytes(cfg, settings, heads, batch * sequence, device)
    return Estimate(
        processes=world.size,
        batch=batch,
        sequence=sequence,
        on_gpu=device.type == "cuda",
        teacher=0 if teacher is None else held_bytes(teacher, settings, world),
        student=held_bytes(student, settings, world),
        gradients=gradients,
        optimizer=None if state is None else round(state * sum(p.numel() for p in trainable) / world.size),
        loss=loss,
        activations=hidden + kept + max(0, again - loss),
        host=max(sizes),
    )


def _student(cfg: DictConfig, settings: Settings, world: World) -> TransformerDecoder:
    model = on_meta(cfg, "model", settings, world)
    if adapters := get_adapter_params(model):
        set_trainable_params(model, adapters)
    return model


def model_bytes(model: TransformerDecoder) -> int:
    return sum(map(_bytes, model.parameters())) + table_bytes(model)


def table_bytes(model: TransformerDecoder) -> int:
    """Rotary tables, each once; those of Llama 3, which need real numbers, are not built on the meta device."""
    ropes = {id(layer.attn.pos_embeddings): layer.attn.pos_embeddings for layer in model.layers}.values()
    llama3 = model.max_seq_len * model.layers[0].attn.head_dim * 4  # [max_seq_len, head width] in fp32
    return sum(sum(map(_bytes, rope.buffers())) or llama3 for rope in ropes)


def held_bytes(model: TransformerDecoder, settings: Settings, world: World) -> int:
    """Weights on one device: all, or with FSDP2 a share of all and what is gathered at the same time."""
    if not world.sharded:
        return model_bytes(model)
    names = settings.custom_sharded_layers
    units = [m for n, m in model.named_modules() if training.get_shard_conditions(n, m, names_to_match=names)]
    in_units = {id(p) for unit in units for p in unit.parameters()}
    share = 0 if settings.fsdp_cpu_offload else sum(map(_bytes, model.parameters())) // world.size
    root = sum(_bytes(p) for p in model.parameters() if id(p) not in in_units)
    sizes = sorted((sum(map(_bytes, unit.parameters())) for unit in units), reverse=True)
    return share + root + sum(sizes[:2] if settings.fsdp_reshard_after_forward else sizes) + table_bytes(model)


def optimizer_bytes_per_element(cfg: DictConfig, dtype: torch.dtype) -> float | None:
    """State per trained element, read off the real optimizer; None where that cannot be told from a small parameter."""
    parameter = nn.Parameter(torch.zeros(16, 32, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer = build_optimizer(cfg, [parameter])
    except UserError:  # not for this device, or not installed
        return None
    optimizer.step()
    state = [v for v in optimizer.state[parameter].values() if isinstance(v, Tensor) and v.numel() > 1]
    if any(v.shape != parameter.shape for v in state):  # factored: does not grow with the elements
        return None
    return sum(map(_bytes, state)) / parameter.numel()


def loss_bytes(cfg: DictConfig, settings: Settings, heads: list[Tensor], tokens: int, device: torch.device) -> int:
    """Workspace of ``linear_kd_loss`` with every token valid, by ``torchtune_kd.kernels``' own rules.

    Args:
        cfg (DictConfig): the config, for ``kd_loss``.
        settings (Settings): its plain values.
        heads (list[Tensor]): [V, D] of the student and, where there is one, of the teacher.
        tokens (int): B x S.
        device (torch.device): that the run is for.
    """
    vocab, logit = min(head.shape[0] for head in heads), sum(head.element_size() for head in heads)
    chunk = min(tokens, chunk_size(tokens, vocab, logit, device))
    objective = Objective(kd_ratio=settings.kd_ratio, **build_kd_loss(cfg).settings())
    has_teacher = len(heads) == 2
    plan = Plan(objective, training_metrics(settings), vocab, "sum", has_teacher=has_teacher, want_grad=True)
    block = BlockLoss(plan, min(chunk, rows_per_block(vocab, device)), torch.float32, torch.device("meta"))
    head, size = heads[0], heads[0].element_size()
    head_gradient = 0
    if head.requires_grad:  # one chunk gives it as it is; several are summed in fp32
        head_gradient = head.numel() * (size if chunk == tokens or size >= 4 else 4 + size)
    return chunk * vocab * logit + sum(map(_bytes, block._work)) + tokens * head.shape[1] * size + head_gradient


def activation_bytes(model: TransformerDecoder, batch: int, sequence: int, settings: Settings) -> tuple[int, int]:
    """What the backward of ``model`` keeps of the forward without the head, and computes again. Changes ``model``."""
    for layer in model.layers:
        layer.attn.pos_embeddings = _Rotation()
        layer.attn._attention_call = _flash_attention
    weight = output_head(model)[0]
    if not settings.enable_activation_checkpointing:
        tokens = torch.empty(batch, sequence, dtype=torch.long, device="meta")
        return saved_bytes(skip_output_head(model), tokens), 0
    x = torch.empty(batch, sequence, weight.shape[1], dtype=weight.dtype, device="meta", requires_grad=True)
    inputs = 0 if settings.enable_activation_offloading else len(model.layers) * _bytes(x)
    return inputs + saved_bytes(model.norm, x), saved_bytes(model.layers[0], x)


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Memory that autograd keeps for the backward pass of ``module(x)``, beside the module's own tensors."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        return kept.setdefault(tensor.untyped_storage()._cdata, tensor)

    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.train()(x)
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in own)


class _Rotation(nn.Module):
    """Stands for rotary embeddings, whose tables do not exist on the meta device: a new tensor, nothing kept."""

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        return x.clone()


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]


def _bytes(tensor: Tensor) -> int:
    if isinstance(tensor, NF4Tensor):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / GIB:.1f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=METHOD.splitlines()[0])
    parser.add_argument("configs", nargs="*", type=Path, help="YAML files; all under configs/ if none is given")
    parser.add_argument("--processes", type=int, default=2, help="P of the kd_distributed configs (2)")
    parser.add_argument("--write", action="store_true", help="write the figures into the heads of the files")
    options = parser.parse_args(argv)
    print(METHOD)
    print(f"{'config':44}{'P':>3}{'B x S':>9}" + "".join(f"{name:>12}" for name in COLUMNS))
    for path in options.configs or sorted(CONFIGS.rglob("*.yaml")):
        e = estimate(path, options.processes)
        cells = [e.fits if name == "fits" else _gib(getattr(e, name)) for name in COLUMNS]
        where = f"{path.parent.name}/{path.stem}"
        print(f"{where:44}{e.processes:3}{f'{e.batch} x {e.sequence}':>9}" + "".join(f"{c:>12}" for c in cells))
        if options.write:
            path.write_text(re.sub(f"^{HEADER}.*$", e.header(), path.read_text(), count=1, flags=re.MULTILINE))


if __name__ == "__main__":
    main()
