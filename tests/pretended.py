"""A device that this machine does not have: tensors compute on the CPU, but say that they are elsewhere.

Like a GPU it refuses an operator whose tensors lie on two devices, so that a tensor left behind on the CPU is found
without a GPU. Results are the CPU's, bit for bit. Nothing else of a GPU is imitated: no streams, kernels or memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "lazy"  # a kind that torch knows, that nothing uses, and whose backward needs no thread or stream of its own
DEVICE = torch.device(NAME, 0)

_aten = torch.ops.aten
# Those that copy between devices, or take indices that still lie on the CPU: the same on a GPU.
_MIXING = {
    _aten.copy_.default, _aten._to_copy.default, _aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default,
}  # fmt: skip


class PretendedTensor(Tensor):
    """A tensor of the pretended device around the CPU's that holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendedTensor:
        made: PretendedTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{NAME}({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretended_device() -> Iterator[None]:
    """Inside, tensors can be made on the pretended device and moved to it."""
    with _Tensors(), _Operators():
        yield


class _Operators(TorchDispatchMode):
    """Operators on tensors of the CPU: they may make some of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Tensors(TorchFunctionMode):
    """``torch.tensor`` and ``new_tensor``, which make their tensor below every dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if func is Tensor.new_tensor and args[0].device == DEVICE:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype} | kwargs).to(DEVICE)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Check where the tensors lie, compute on the CPU, and wrap what belongs on the device."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [t for t in tensors if isinstance(t, PretendedTensor)]
    # A number on the CPU may take part, as on a GPU.
    elsewhere = [t for t in tensors if not isinstance(t, PretendedTensor) and t.dim() > 0]
    if here and elsewhere and (func not in _MIXING or (func is _aten.index.Tensor and args[0] is elsewhere[0])):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {DEVICE} and cpu in {func}")
    stays = bool(here)
    if kwargs.get("device") is not None:
        stays = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": "cpu" if stays else kwargs["device"]}
    result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if func is _aten.copy_.default:
        return args[0]
    known = {id(t.inner): t for t in here}  # what works in place returns what it was given
    return tree_map(lambda leaf: known[id(leaf)] if id(leaf) in known else _wrapped(leaf), result) if stays else result


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, PretendedTensor) else leaf


def _wrapped(leaf: Any) -> Any:
    return PretendedTensor(leaf) if isinstance(leaf, Tensor) else leaf
