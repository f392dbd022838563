"""Knowledge distillation for torchtune: losses, models, shared training steps and recipes.

Nothing is imported here: PyTorch loads this package at the end of every ``import torch`` (see
``torchtune_kd/_registry.py``), and ``torchtune_kd.kernels`` is for programs without torchtune.
"""

__version__ = "0.1.0"
