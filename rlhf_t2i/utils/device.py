"""The device of this process, and moving values between devices."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


def default_device() -> torch.device:
    """The GPU where there is one (Ray and CUDA_VISIBLE_DEVICES decide which is seen), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def move(value: T, device: torch.device) -> T:
    """Move the tensors inside lists, tuples and dictionaries to a device, detached."""
    moved: T = tree_map_only(Tensor, lambda tensor: tensor.detach().to(device), value)
    return moved
