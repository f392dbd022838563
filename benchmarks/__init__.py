"""Benchmarks, run from the root of a checkout: ``python -m benchmarks.losses``. Not part of the package."""

import importlib.util
import os
from pathlib import Path

# OpenMP's threads wait by spinning, and beside other busy processes that is most of what would be measured. PyTorch
# reads this when it is loaded, which is after this line; `python -m benchmarks.waiting` measures both ways.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# In a checkout that is not installed, Python finds the folder torchtune_kd/ and none of the folders that the package
# maps (kernels/, recipes/, configs/): they stand beside it.
if importlib.util.find_spec("torchtune_kd.kernels") is None:
    import torchtune_kd

    torchtune_kd.__path__.append(str(Path(__file__).resolve().parents[1]))
