"""What torchtune 0.6.1 lacks for distillation: SmolLM2, layer-pruned students, GGUF files, checks for NF4."""

from torchtune_kd._versions import check_versions
from torchtune_kd._warnings import silence_known_warnings

check_versions()  # before torchtune is imported: its own failure with a wrong torchao says nothing
silence_known_warnings()  # before torchao is imported, also where PyTorch loads no plug-ins

from torchtune_kd.models.gguf import gguf_to_hf
from torchtune_kd.models.nf4 import check_nf4_build, check_nf4_shapes
from torchtune_kd.models.output_head import output_head, skip_output_head
from torchtune_kd.models.pruning import (
    layer_influence,
    prune_checkpoint,
    removal_influence,
    select_layers,
    text_batches,
)

__all__ = [
    "check_nf4_build",
    "check_nf4_shapes",
    "gguf_to_hf",
    "layer_influence",
    "output_head",
    "prune_checkpoint",
    "removal_influence",
    "select_layers",
    "skip_output_head",
    "text_batches",
]
