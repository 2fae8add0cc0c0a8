"""The device of this process, and moving values between devices."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


def default_device() -> torch.device:
    """The GPU where there is one (Ray and CUDA_VISIBLE_DEVICES decide which is seen), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def move(value: T, device: torch.device) -> T:
    """Move the tensors inside lists, tuples and dictionaries to a device, detached."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.detach().to(device)
    elif isinstance(value, dict):
        moved = {key: move(item, device) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        moved = type(value)(move(item, device) for item in value)
    return cast(T, moved)
