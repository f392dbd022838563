"""Decoders for distillation: SmolLM2, access to the output head, checks for NF4, building and loading."""

from torchtune_kd._versions import check_versions
from torchtune_kd._warnings import silence_known_warnings

check_versions()  # before torchtune is imported: its own failure with a wrong torchao says nothing
silence_known_warnings()  # before torchao is imported, also where PyTorch loads no plug-ins

from torchtune_kd.models.nf4 import check_nf4_build, check_nf4_shapes
from torchtune_kd.models.output_head import output_head, skip_output_head

__all__ = ["check_nf4_build", "check_nf4_shapes", "output_head", "skip_output_head"]
