"""What the host may ask of a device without waiting for it."""

import torch


def answers_at_once(device: torch.device) -> bool:
    """Whether reading a value of a tensor there does not make the host wait for queued work."""
    return device.type == "cpu"


def is_capturing(device: torch.device) -> bool:
    """Return whether work on `device` is being captured in a CUDA graph, where the host cannot wait for it."""
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
