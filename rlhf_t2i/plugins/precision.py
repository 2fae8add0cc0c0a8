"""Parts of a reward that stay in float32 where the reward runs in bfloat16: heads, norms and cosines.

bfloat16 has 8 bits: a rating near 5.5 would lie on a grid of 1/32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own dtype if that is more precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A block in which the tensor's device computes in the dtypes of its operands."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class Float32(nn.Module):
    """Keeps a module's weights and products in float32 (or float64), whatever the reward is moved to.

    Subclass it, or put modules into it as attributes, and define ``forward`` as always.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if narrow else moved

        return super()._apply(keep, recurse)

    def __call__(self, *inputs: Tensor, **more: object) -> Tensor:
        """Call ``forward`` outside autocast, with floating-point inputs in the weights' dtype if there are weights."""
        weight = next(self.parameters(), None)
        if weight is not None:
            inputs = tuple(x.to(weight.dtype) if x.is_floating_point() else x for x in inputs)
        with without_autocast(inputs[0]):
            called: Tensor = super().__call__(*inputs, **more)
        return called
