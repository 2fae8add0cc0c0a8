"""A device that this machine does not have: tensors compute on the CPU, but say that they are elsewhere.

Like a GPU it refuses an operator whose tensors lie on two devices, so that a tensor left behind on the CPU is found
without a GPU. It also counts what would make the host wait for the device (:data:`WAITS`). Results are the CPU's, bit
for bit. Nothing else of a GPU is imitated: no streams, kernels or memory.
"""

from __future__ import annotations

import traceback
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
WAITS: list[str] = []
"""Where the host waited for the device: the innermost line of this project, and the operator. Clear it to count.

Reading a tensor waits, also for its shape where that depends on the numbers (``nonzero``, a mask as an index). Sending
one waits unless it is ``non_blocking``: torch then synchronizes the stream after the copy.
"""
_READS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default}
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}
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
    if _waits(func, args, kwargs):
        _note(func)
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


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host would wait for a GPU in this operator."""
    if func in _READS:
        return any(isinstance(argument, PretendedTensor) for argument in args)
    if func in _COPIES:
        source = args[1] if func is _aten.copy_.default else args[0]
        target = args[0].device if func is _aten.copy_.default else kwargs.get("device") or source.device
        here, there = isinstance(source, PretendedTensor), torch.device(target).type == NAME
        return here != there and (here or not _non_blocking(func, args, kwargs))
    if func in _INDEXING and isinstance(args[0], PretendedTensor):
        return any(i is not None and (not isinstance(i, PretendedTensor) or i.dtype == torch.bool) for i in args[1])
    return False


def _non_blocking(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))


def _note(func: Any) -> None:
    frames = [
        frame for frame in traceback.extract_stack() if "/rlhf_t2i/" in frame.filename or "/plugins/" in frame.filename
    ]
    frames = [frame for frame in frames if "site-packages" not in frame.filename]
    where = f"{frames[-1].filename.rsplit('/main/', 1)[-1]}:{frames[-1].lineno} {frames[-1].name}" if frames else "?"
    WAITS.append(f"{where}: {func}")
