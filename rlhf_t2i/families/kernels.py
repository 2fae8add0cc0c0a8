"""The kernels of a network: what every operator of a forward computes and moves, by kind.

Gradients are derived from the forward: every product has one of equal cost in its input and one in its weights,
attention's backward recomputes a product and has five instead of two (FlashAttention-2, arXiv 2307.08691), and an
operator that only moves memory reads a gradient besides what the forward read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

Kind = Literal["matmul", "convolution", "attention", "wide attention", "memory"]
"""What bounds a kernel; ``wide attention`` has heads that FlashAttention refuses, as decoders' one head of 512."""
Pass = Literal["forward", "inputs", "weights"]

_KINDS: Mapping[str, Kind] = {
    "mm": "matmul", "addmm": "matmul", "bmm": "matmul", "baddbmm": "matmul", "convolution": "convolution",
}  # fmt: skip
_FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_unsafe_view"}
"""Operators that start no kernel, besides views."""
_FLASH_HEAD = 256
_ATTENTION_BACKWARD = 2.5
_MEMORY_BACKWARD = 1.5


@dataclass(frozen=True)
class Kernel:
    """One operator on one sample.

    Attributes:
        kind: What bounds it.
        bits: Of its numbers.
        flops: A multiply-add counts two.
        moved: Bytes of activations read and written.
        weights: Bytes of weights read, once for all samples of a batch.
    """

    kind: Kind
    bits: int
    flops: int
    moved: int
    weights: int


Kernels = Counter[Kernel]


def kernel(func: OpOverload, inputs: object, result: object, flops: int, owned: Collection[int]) -> Kernel | None:
    """The kernel that an operator starts; None for views and allocations.

    Args:
        func: The operator.
        inputs: Its arguments.
        result: What it returned.
        flops: Of its product.
        owned: Storages of the network's own weights, by address.
    """
    name = func._overloadpacket.__name__
    if name in _FREE or func.is_view:
        return None
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    read = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if not made:
        return None
    mine = [leaf for leaf in read if leaf.untyped_storage()._cdata in owned]
    weights = sum(leaf.nbytes for leaf in mine)
    moved = sum(leaf.nbytes for leaf in (*read, *made)) - weights
    return Kernel(_KINDS.get(name, "memory"), 8 * made[0].element_size(), flops, moved, weights)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Kernel:
    """Fused attention: the matrix of scores stays on the chip."""
    flops = 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    output = query.nbytes // query.shape[-1] * value.shape[-1]
    moved = sum(t.nbytes for t in (query, key, value)) + output
    kind: Kind = "attention" if query.shape[-1] <= _FLASH_HEAD else "wide attention"
    return Kernel(kind, 8 * query.element_size(), flops, moved, 0)


def of_pass(forward: Kernels, which: Pass) -> Kernels:
    """The kernels of a forward, of the gradient in its input, or of the gradients in its weights."""
    if which == "forward":
        return forward
    found: Kernels = Counter()
    for item, count in forward.items():
        if which == "inputs":
            found[_input_gradient(item)] += count
        elif item.weights and item.kind != "memory":
            found[item] += count
    return found


def _input_gradient(item: Kernel) -> Kernel:
    if item.kind in ("attention", "wide attention"):
        flops, moved = _ATTENTION_BACKWARD * item.flops, 2 * item.moved
        return Kernel(item.kind, item.bits, int(flops), moved, 0)
    if item.kind == "memory":
        return Kernel(item.kind, item.bits, 0, int(_MEMORY_BACKWARD * item.moved), item.weights)
    return item
