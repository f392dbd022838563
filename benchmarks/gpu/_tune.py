"""torchtune's command line with our recipes in it, also in a checkout that is not installed."""

import sys

import benchmarks  # noqa: F401  makes the folders of the checkout importable
from torchtune_kd.__main__ import main

if __name__ == "__main__":
    sys.argv[0] = "tune"
    main()
