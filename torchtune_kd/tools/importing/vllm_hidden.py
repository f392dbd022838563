"""Hidden states that vLLM's ``extract_hidden_states`` wrote, a safetensors file for each request.

A file holds ``hidden_states`` [n, layers, D] and ``token_ids`` [n]. The layers stand in their order in the model: where
``num_hidden_layers`` was asked for, the last of them are the states behind the last layer, to which the teacher's final
norm has not been applied. It is applied here.

Shapes: n tokens of a request, D hidden width, V vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchtune_kd.caches.layout import HEAD
from torchtune_kd.caches.states import FLOATS, encode
from torchtune_kd.config.reading import Config
from torchtune_kd.distributed.world import World
from torchtune_kd.errors import UserError, first_line
from torchtune_kd.models.build import on_meta
from torchtune_kd.models.loading import check_weights, load_weights
from torchtune_kd.models.output_head import output_head
from torchtune_kd.storage.atomic import flush_file
from torchtune_kd.storage.manifest import file_facts
from torchtune_kd.tools.importing.rows import source_files
from torchtune_kd.tools.importing.told import Told

SAFETENSORS = (".safetensors",)
_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_PREDICTED = 512  # tokens by which a wrong layer is seen


def read_vllm_hidden(source: Path, width: int, layer: int = -1) -> Iterator[Told]:
    """Yield the states of each request.

    Args:
        source (Path): a file, or a folder of them.
        width (int): D of the teacher.
        layer (int): which of the file's layers; the last one unless others were asked for behind it.

    Raises:
        UserError: for a file that has no such tensors, or of another width.
    """
    for file in source_files(source, SAFETENSORS):
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"Expected a safetensors file, but {file} cannot be read ({first_line(error)}): leave it out."
            ) from error
        states, tokens = tensors.get("hidden_states"), tensors.get("token_ids")
        if states is None or tokens is None:
            raise UserError(
                f"Expected `hidden_states` and `token_ids`, but {file} has {', '.join(sorted(tensors)) or 'nothing'}: "
                "name a folder that vLLM's extract_hidden_states wrote."
            )
        if states.dim() != 3 or tokens.dim() != 1 or len(states) != len(tokens):
            raise UserError(
                f"Expected states [n, layers, width] of n ids, but {file} has {list(states.shape)} of "
                f"{list(tokens.shape)}: leave it out."
            )
        if states.shape[-1] != width:
            raise UserError(
                f"Expected states of the teacher's width {width}, but those in {file} are {states.shape[-1]} wide: "
                "name the teacher that gave them under `teacher_model`."
            )
        if not -states.shape[1] <= layer < states.shape[1]:
            raise UserError(f"Expected --layer below the {states.shape[1]} layers in {file}, got {layer}: change it.")
        ids = tokens.numpy().astype(np.int64)
        if len(ids):
            yield Told(str(file), (ids, ids[:-1]), np.arange(len(ids)), states[:, layer])


class HiddenCoding:
    """Turn states from before the final norm into the columns of a cache of kind ``hidden``.

    Args:
        config (Config): whose ``teacher_model`` and ``teacher_checkpointer`` have the final norm and the head.
        world (World): this process.
        dtype (str): "bf16", "fp16" or "fp32".

    Attributes:
        width (int): D.
        vocab (int): V.
        nats (Tensor): of the tokens that follow, for the first of the positions.

    Raises:
        UserError: if the config names no teacher, or its files cannot be read.
    """

    def __init__(self, config: Config, world: World, dtype: str) -> None:
        if config.teacher_model is None or config.teacher_checkpointer is None:
            raise UserError(
                "Expected `teacher_model` and `teacher_checkpointer` in the config, whose final norm and head the "
                "states need, but one is missing: name the teacher that gave them."
            )
        teacher = on_meta(config.teacher_model, config.settings, world)
        _, weights = load_weights(config.teacher_checkpointer)
        assert weights is not None
        check_weights(teacher, weights, "teacher_checkpointer")
        names = {id(parameter): name for name, parameter in teacher.named_parameters()}
        weight, bias = (None if part is None else weights[names[id(part)]] for part in output_head(teacher))
        assert weight is not None
        self.weight, self.bias = weight, bias
        self._norm = teacher.norm.to_empty(device="cpu").float()
        own = {name: weights[f"norm.{name}"].float() for name in self._norm.state_dict()}
        self._norm.load_state_dict(own)
        self._dtype, self._given = dtype, ""
        self.vocab, self.width = weight.shape
        self.nats = torch.zeros(0)

    @torch.no_grad()
    def __call__(self, signal: Tensor, labels: np.ndarray, where: str) -> dict[str, Tensor]:
        """Return ``states`` [n, D] of n positions.

        Raises:
            UserError: for states that are not finite.
        """
        self._given = _NAMES.get(signal.dtype, str(signal.dtype))
        states = self._norm(signal.float())
        if not torch.isfinite(states).all():
            raise UserError(f"Expected finite states, but one in {where} is not: leave that file out.")
        followed = torch.from_numpy(labels >= 0)
        some = states[followed][: max(0, _PREDICTED - len(self.nats))]
        if len(some):
            head = self.weight.float(), None if self.bias is None else self.bias.float()
            logits = torch.nn.functional.linear(some, *head)
            following = torch.from_numpy(labels)[followed][: len(some)]
            nats = torch.nn.functional.cross_entropy(logits, following, reduction="none")
            self.nats = torch.cat([self.nats, nats])
        return encode(states, self._dtype, torch.ones(self.width))

    def facts(self) -> dict[str, Any]:
        """Return what a manifest says of the kind."""
        return {
            "kind": "hidden",
            "dtype": self._dtype,
            "k": None,
            "temperatures": [],
            "computed_in": self._given,
            "width": self.width,
            "vocab": self.vocab,
            "has_bias": self.bias is not None,
            "error": {},
        }

    def write(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Write the head, and return its file with ``bytes`` and ``sha256``."""
        tensors = {"weight": self.weight, "channel_rms": torch.ones(self.width)}
        if self.bias is not None:
            tensors["bias"] = self.bias
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / HEAD, {"error": "{}"})
        flush_file(folder / HEAD)
        return {HEAD: file_facts(folder / HEAD)}
