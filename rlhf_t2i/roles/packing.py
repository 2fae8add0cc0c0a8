"""Weights on their way to another process: arrays of bytes, which Ray writes to its store without pickling them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

Packed = dict[str, tuple[torch.dtype, tuple[int, ...], np.ndarray]]
"""By name, a tensor's dtype, shape and bytes. numpy knows no bfloat16."""


def pack(named: Iterable[tuple[str, Tensor]]) -> Packed:
    """Copy tensors to host memory."""
    packed: Packed = {}
    for name, tensor in named:
        data = tensor.detach().reshape(-1).cpu().view(torch.uint8).numpy()
        # On a CPU these are the weights themselves, which may change before the other process has read them.
        packed[name] = tensor.dtype, tuple(tensor.shape), data.copy() if tensor.device.type == "cpu" else data
    return packed


def unpack(packed: Packed) -> dict[str, Tensor]:
    """The tensors, on the CPU; in the memory of ``packed``, which may be read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        # A view of no bytes has no strides that another dtype accepts.
        return {
            name: torch.from_numpy(data).view(dtype).reshape(shape) if data.size else torch.empty(shape, dtype=dtype)
            for name, (dtype, shape, data) in packed.items()
        }


def size(packed: Packed) -> int:
    """Bytes."""
    return sum(data.nbytes for _, _, data in packed.values())
