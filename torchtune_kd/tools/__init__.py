"""Commands on checkpoints: fetch a model, read GGUF files, keep some of the layers."""

from torchtune_kd._versions import check_versions
from torchtune_kd._warnings import silence_known_warnings

check_versions()  # before torchtune is imported: its own failure with a wrong torchao says nothing
silence_known_warnings()  # before torchao is imported, also where PyTorch loads no plug-ins

from torchtune_kd.tools.gguf_reader import gguf_to_hf
from torchtune_kd.tools.layer_choice import (
    layer_influence,
    prune_checkpoint,
    removal_influence,
    select_layers,
    text_batches,
)
from torchtune_kd.tools.smollm2 import fetch_smollm2

__all__ = [
    "fetch_smollm2",
    "gguf_to_hf",
    "layer_influence",
    "prune_checkpoint",
    "removal_influence",
    "select_layers",
    "text_batches",
]
