"""The device of this process, and moving values between devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def default_device() -> torch.device:
    """The GPU where there is one (Ray and CUDA_VISIBLE_DEVICES decide which is seen), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def move(value: Any, device: torch.device) -> Any:
    """Move the tensors inside lists, tuples and dictionaries to a device, detached."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, dict):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(move(item, device) for item in value)
    return value
