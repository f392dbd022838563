"""Decoders for distillation: SmolLM2, access to the output head, checks for NF4, building and loading."""

from torchtune_kd._torchtune import prepare_import

prepare_import()

from torchtune_kd.models.nf4 import check_nf4_build, check_nf4_shapes
from torchtune_kd.models.output_head import output_head, skip_output_head

__all__ = ["check_nf4_build", "check_nf4_shapes", "output_head", "skip_output_head"]
