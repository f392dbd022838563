"""Benchmarks, run from the root of a checkout: ``python -m benchmarks.losses``. Not part of the package."""

import os

# OpenMP's threads wait by spinning, and beside other busy processes that is most of what would be measured. PyTorch
# reads this when it is loaded, which is after this line; `python -m benchmarks.waiting` measures both ways.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
