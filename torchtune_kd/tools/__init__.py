"""Commands on checkpoints: fetch a model, read GGUF files, keep some of the layers."""

from torchtune_kd._torchtune import prepare_import

prepare_import()

from torchtune_kd.tools.gguf_reader import gguf_to_hf
from torchtune_kd.tools.kept_layers import prune_checkpoint
from torchtune_kd.tools.layer_choice import layer_influence, removal_influence, select_layers, text_batches
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
