"""The models that are evaluated: which they are, and how they are loaded.

Shapes: B batch, S sequence, D hidden width, V vocabulary.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import DoRALinear, LoRALinear

from torchtune_kd.config.checks import check_checkpoint_files, check_tokenizer_files, checkpoint_files
from torchtune_kd.config.reading import Config
from torchtune_kd.config.sections import Section
from torchtune_kd.config.settings import Settings
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError, loading
from torchtune_kd.kernels import shared_vocab
from torchtune_kd.models.build import build_decoder, on_meta
from torchtune_kd.models.loading import check_weights, load, load_weights
from torchtune_kd.models.output_head import output_head, skip_output_head


@dataclass(frozen=True)
class Source:
    """Where a model comes from: its builder and its files."""

    name: str
    model: Section
    checkpointer: Section

    @property
    def files(self) -> list[Path]:
        """Return the files of its weights."""
        return checkpoint_files(self.checkpointer)


class Candidate:
    """A model under evaluation: a frozen decoder that gives its last hidden states, and the head that reads them."""

    def __init__(self, source: Source, decoder: TransformerDecoder, device: torch.device) -> None:
        self.name, self.source, self.device = source.name, source, device
        self.decoder = skip_output_head(decoder).eval().requires_grad_(False)
        self.max_seq_len = decoder.max_seq_len

    @torch.inference_mode()
    def states(self, tokens: Tensor, **attention: Any) -> Tensor:
        """Return the last hidden states [B, S, D] of tokens [B, S], after the final norm."""
        moved = {name: value.to(self.device) for name, value in attention.items()}
        return self.decoder(tokens.to(self.device), **moved)

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return the head's weight [V, D] and its bias [V] or None."""
        return output_head(self.decoder)

    @property
    def vocab_size(self) -> int:
        return self.head[0].shape[0]


def sources_of(config: Config) -> dict[str, Source]:
    """Find the models of a training run's config.

    ``teacher`` is its teacher, ``untrained`` the student that it starts from, and ``student`` the newest
    ``epoch_<n>`` in ``output_dir``, where there is one.
    """
    found = {}
    if config.checkpointer is not None:
        found["untrained"] = Source("untrained", _without_nf4(config.model), config.checkpointer)
        exports = sorted(Path(config.settings.output_dir).glob("epoch_*"), key=_epoch)
        if exports and _epoch(exports[-1]) >= 0:
            found["student"] = Source(
                "student", _without_nf4(config.model), _exported(config.checkpointer, exports[-1])
            )
    if config.teacher_model is not None and config.teacher_checkpointer is not None:
        found["teacher"] = Source("teacher", config.teacher_model, config.teacher_checkpointer)
    return found


def check_sources(sources: list[Source], reference: Source | None, settings: Settings, world: World) -> None:
    """Build the models on the meta device, and look for their files.

    Raises:
        UserError: for the first that is missing or does not fit.
    """
    sizes = {}
    for source in [*sources, *([reference] if reference else [])]:
        check_checkpoint_files(source.checkpointer)
        sizes[source.name] = output_head(on_meta(source.model, settings, world))[0].shape[0]
    for source in sources if reference is not None else []:
        try:
            check_tokenizer_files((source.checkpointer, reference.checkpointer))
            shared_vocab(sizes[source.name], sizes[reference.name])
        except ValueError as error:
            raise UserError(
                f"The KL of `{source.name}` to `{reference.name}` needs one tokenizer for both, but they differ: "
                f"choose models of one family. ({error})"
            ) from error


def load_candidate(source: Source, settings: Settings, world: World) -> Candidate:
    """Load a model with its weights, in the dtype of ``settings``."""
    with loading(source.name, world.device):
        _, weights = load_weights(source.checkpointer)
        decoder = build_decoder(source.model, settings, world)
        check_weights(decoder, weights, source.checkpointer.path)
        for module in decoder.modules():
            if isinstance(module, LoRALinear | DoRALinear):
                module.disabled = True  # the files hold merged weights
        load(decoder, weights, {}, settings, world)
    return Candidate(source, decoder, world.device)


def _without_nf4(model: Section) -> Section:
    """Return the section for merged weights: quantised again they would be another model."""
    return model.changed(quantize_base=False) if model.get("quantize_base") else model


def _exported(checkpointer: Section, folder: Path) -> Section:
    files = sorted(path.name for path in folder.glob("*.safetensors")) or sorted(p.name for p in folder.glob("*.pt"))
    if not files:
        raise UserError(
            f"{folder} holds no merged weights, only an adapter: train with `save_adapter_weights_only: False` to "
            "evaluate what was trained."
        )
    return checkpointer.changed(checkpoint_dir=str(folder), checkpoint_files=files)


def _epoch(folder: Path) -> int:
    match = re.fullmatch(r"epoch_(\d+)", folder.name)
    return int(match[1]) if match and folder.is_dir() else -1


def each(sources: list[Source], reference: Candidate | None, settings: Settings, world: World) -> Iterator[Candidate]:
    """Load one model after the other, so that no more than one is held beside the reference."""
    for source in sources:
        if reference is not None and source.name == reference.name:
            yield reference
            continue
        yield load_candidate(source, settings, world)
