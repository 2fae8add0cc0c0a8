"""The device of this process, and moving values between devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


def default_device() -> torch.device:
    """The GPU where there is one (Ray and CUDA_VISIBLE_DEVICES decide which is seen), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; where it leaves the CPU, without waiting for what the device does meanwhile.

    A plain ``to`` waits for all work that is queued. Pinned memory lets a large copy, too, run behind that work.
    """
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def move(value: T, device: torch.device) -> T:
    """Move the tensors inside lists, tuples and dictionaries to a device, detached."""
    moved: T = tree_map_only(Tensor, lambda tensor: send(tensor.detach(), device), value)
    return moved


class Sending(TorchFunctionMode):
    """Inside, a library's own ``tensor.to(device)`` does not wait where the tensor leaves the CPU; see :func:`send`."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Change the one call."""
        named = dict(kwargs or {})
        leaves = func is Tensor.to and isinstance(args[0], Tensor) and args[0].device.type == "cpu"
        if leaves and not any(isinstance(arg, bool) for arg in args):  # non_blocking by position
            named["non_blocking"] = True
        return func(*args, **named)
