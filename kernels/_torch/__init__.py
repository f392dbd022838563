"""The loss arithmetic in PyTorch operations, for any device and in fp64 too."""
