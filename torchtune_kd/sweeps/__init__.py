"""Many runs of one recipe over a grid: which, in what order, resumed and shared by several processes."""

from torchtune_kd._torchtune import prepare_import

prepare_import()

from torchtune_kd.sweeps.forecast import forecast
from torchtune_kd.sweeps.request import Request, read_request
from torchtune_kd.sweeps.sweep import run_sweep

__all__ = ["Request", "forecast", "read_request", "run_sweep"]
