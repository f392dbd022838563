"""Benchmarks, run from the root of a checkout: ``python -m benchmarks.losses``. Not part of the package."""
