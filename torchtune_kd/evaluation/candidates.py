"""The models that are evaluated: which they are, and how they are loaded.

Shapes: B batch, S sequence, D hidden width, V vocabulary.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
from torchtune_kd.storage.fingerprints import files_fingerprint

OF_STUDENT = ("untrained", "student")  # names of a run's student, before training and after


@dataclass(frozen=True)
class Source:
    """Name a model's builder and its files."""

    name: str
    model: Section
    checkpointer: Section

    @property
    def files(self) -> list[Path]:
        """Return the files of its weights."""
        return checkpoint_files(self.checkpointer)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a fingerprint of its weights: two models may have one name."""
        return files_fingerprint(self.files)


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
    ``epoch_<n>`` in ``output_dir``, where there is one. Of ``teachers`` those that run have their own names.

    Raises:
        UserError: for a teacher with the student's name.
    """
    found = {}
    if config.checkpointer is not None:
        model = _without_nf4(config.model)
        found["untrained"] = Source("untrained", model, config.checkpointer)
        newest = max(Path(config.settings.output_dir).glob("epoch_*"), key=_epoch, default=None)
        exported = None if newest is None or _epoch(newest) < 0 else _exported(config.checkpointer, newest)
        if exported is not None:
            found["student"] = Source("student", model, exported)
    if config.teacher_model is not None and config.teacher_checkpointer is not None:
        found["teacher"] = Source("teacher", config.teacher_model, config.teacher_checkpointer)
    for entry in config.teachers:
        if entry.model is not None and entry.checkpointer is not None:
            if entry.name in OF_STUDENT:
                raise UserError(
                    f"Expected a name of its own for each model that is evaluated, but `{entry.path}` is called "
                    f"`{entry.name}`, as the student is here: give that teacher another `name`."
                )
            found[entry.name] = Source(entry.name, entry.model, entry.checkpointer)
    return found


class Limits(NamedTuple):
    """Bound what all models can read."""

    max_seq_len: int  # tokens of the longest sequence
    vocab: int  # ids from 0 to vocab - 1


def check_sources(sources: list[Source], reference: Source | None, settings: Settings, world: World) -> Limits:
    """Build the models on the meta device, and look for their files.

    Returns:
        Limits: of the smallest of them.

    Raises:
        UserError: for the first that is missing or does not fit.
    """
    built = {}
    for source in [*sources, *([reference] if reference else [])]:
        check_checkpoint_files(source.checkpointer)
        built[source.name] = on_meta(source.model, settings, world)
    sizes = {name: output_head(model)[0].shape[0] for name, model in built.items()}
    for source in sources if reference is not None else []:
        try:
            check_tokenizer_files((source.checkpointer, reference.checkpointer))
            shared_vocab(sizes[source.name], sizes[reference.name])
        except ValueError as error:
            raise UserError(
                f"The KL of `{source.name}` to `{reference.name}` needs one tokenizer for both, but they differ: "
                f"choose models of one family. ({error})"
            ) from error
    return Limits(min(model.max_seq_len for model in built.values()), min(sizes.values()))


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


def _exported(checkpointer: Section, folder: Path) -> Section | None:
    """Return the section of merged weights in an export; None where it holds an adapter alone."""
    files = sorted(path.name for path in folder.glob("*.safetensors")) or sorted(p.name for p in folder.glob("*.pt"))
    return checkpointer.changed(checkpoint_dir=str(folder), checkpoint_files=files) if files else None


def _epoch(folder: Path) -> int:
    match = re.fullmatch(r"epoch_(\d+)", folder.name)
    return int(match[1]) if match and folder.is_dir() else -1
