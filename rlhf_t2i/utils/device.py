"""The device of this process."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """The GPU where there is one (Ray and CUDA_VISIBLE_DEVICES decide which is seen), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
