"""Measure how good, fast and large models are, and how far a student is from its teacher."""

from torchtune_kd._torchtune import prepare_import

prepare_import()

from torchtune_kd.evaluation.request import Request, read_request
from torchtune_kd.evaluation.runner import evaluate
from torchtune_kd.evaluation.table import as_table

__all__ = ["Request", "as_table", "evaluate", "read_request"]
