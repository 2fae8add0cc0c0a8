"""FLOPs, parameters and activation memory of any network, counted on the meta device: shapes flow, nothing is computed.

What convolutions and attention borrow while they run is their libraries' choice and is not counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType
from typing import Literal

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rlhf_t2i.families import kernels as kernel_counts
from rlhf_t2i.families import layouts
from rlhf_t2i.families.frozen import freeze_convs
from rlhf_t2i.families.recomputing import checkpoint_layers

Mode = Literal["forward", "input", "train"]
"""``forward``: no gradient. ``input``: frozen, with the gradient in its input. ``train``: with that of its weights."""


@dataclass(frozen=True)
class Network:
    """A network to be counted; counts of one ``key`` are made once per process.

    Attributes:
        key: Identifies everything below.
        build: Makes the network on the meta device, in its dtype.
        call: Runs it on one sample: ``call(network) -> (input, output)``; the input wants a gradient.
        recompute: Switches activation checkpointing on, as the role that runs the network does.
    """

    key: tuple[object, ...]
    build: Callable[[], nn.Module] = field(compare=False)
    call: Callable[[nn.Module], tuple[Tensor, Tensor]] = field(compare=False)
    recompute: Callable[[nn.Module], None] = field(default=checkpoint_layers, compare=False)

    def sizes(self) -> tuple[int, ...]:
        """Numbers in each trained parameter: of a network with adapters, in the adapters."""
        return self._built.sizes

    def parameters(self) -> int:
        """Numbers in all parameters."""
        return self._built.parameters

    def layers(self) -> int:
        """Modules that have parameters of their own."""
        return self._built.layers

    def reordered(self) -> int:
        """Numbers in the weights that channels-last memory order copies: those of convolutions."""
        return self._built.reordered

    @property
    def _built(self) -> _Built:
        return _built(self)

    def flops(self) -> int:
        """FLOPs of one sample's forward; a multiply-add counts two."""
        return self._forward()[0]

    def kernels(self) -> kernel_counts.Kernels:
        """The kernels of one sample's forward."""
        return self._forward()[2]

    @cache  # noqa: B019 - one entry per key, and a process knows few networks
    def _forward(self) -> tuple[int, int, kernel_counts.Kernels]:
        """(FLOPs, peak bytes of activations, kernels) of one sample's forward without gradient."""
        network = self._frozen()
        with torch.no_grad(), _Counter(network) as counter:
            self.call(network)
        return counter.flops, counter.highest, counter.kernels

    def _frozen(self) -> nn.Module:
        return freeze_convs(self.build()).to(memory_format=torch.channels_last)

    @cache  # noqa: B019
    def activations(self, mode: Mode, recomputed: bool = False) -> int:
        """Peak bytes of one sample's activations, without parameters and their gradients.

        Args:
            mode: What is run. A network that is not trained has the frozen convolutions of the roles.
            recomputed: Whether layers are recomputed in the backward pass.
        """
        if mode == "forward":
            return self._forward()[1]
        network = self.build() if mode == "train" else self._frozen()
        if recomputed:
            self.recompute(network)
        return peak(network, lambda: self.call(network))


@dataclass(frozen=True)
class _Built:
    """What a network's parameters tell; see the methods of :class:`Network`."""

    sizes: tuple[int, ...]
    parameters: int
    layers: int
    reordered: int


@cache
def _built(network: Network) -> _Built:
    """Built once per key, and a process knows few: SDXL's UNet takes most of a second."""
    module = network.build()
    parameters = list(module.parameters())
    convolutions = [p.detach() for p in parameters if p.ndim == 4]
    return _Built(
        sizes=tuple(p.numel() for p in parameters if p.requires_grad),
        parameters=sum(p.numel() for p in parameters),
        layers=sum(1 for m in module.modules() if next(m.parameters(recurse=False), None) is not None),
        reordered=sum(w.numel() for w in convolutions if w.to(memory_format=torch.channels_last) is not w),
    )


def flops(call: Callable[[], object]) -> int:
    """FLOPs of a call on meta tensors, backward included: matrix products, convolutions and attention."""
    with _Counter() as counter:
        call()
    return counter.flops


def peak(network: nn.Module, call: Callable[[], tuple[Tensor, Tensor]]) -> int:
    """Peak bytes alive in a forward and the backward to its input, on meta tensors or real ones.

    Args:
        network: Its parameters and buffers are left out, and so are gradients of parameters.
        call: Makes the input and gives (input, output).
    """
    with torch.enable_grad(), _Counter(network) as counter:
        leaf, output = call()
        torch.autograd.grad(output, leaf, torch.empty_like(output))
        del leaf, output
    return counter.highest


class _Counter(TorchDispatchMode):
    """Adds up FLOPs, and the storages that operators make while they live; a network's own are left out.

    torch's FlopCounterMode has the formulas, but tracks modules by hooks that fail on inputs that are views.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.flops = self.highest = self._now = 0
        # By address, which is a storage's own while it lives.
        owned = () if network is None else (*network.parameters(), *network.buffers())
        self._owned = frozenset(t.untyped_storage()._cdata for t in owned)
        self._known = set(self._owned)
        self.kernels: kernel_counts.Kernels = Counter()

    def __enter__(self) -> _Counter:
        self._settings = ExitStack()
        self._settings.enter_context(_flash_attention(self))
        # Masks select everything: nothing is known about their values.
        self._settings.enter_context(fx_config.patch(meta_nonzero_assume_all_nonzero=True))
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._settings.close()

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        result = layouts.run(func, args, kwargs or {})
        flops = 0
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        self.flops += flops
        if (kernel := kernel_counts.kernel(func, (args, kwargs), result, flops, self._owned)) is not None:
            self.kernels[kernel] += 1
        for made in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.highest = max(self.highest, self._now)
        return result

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size


class _Flash(torch.autograd.Function):
    """Keeps what flash attention keeps: query, key, value, output and one number per row."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, *grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def _flash_attention(counter: _Counter) -> Iterator[None]:
    """On the meta device torch takes the path that keeps the whole attention matrix; GPUs and CPUs do not."""
    original = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        kernel = kernel_counts.attention(query, key, value)
        counter.flops += kernel.flops
        counter.kernels[kernel] += 1
        return _Flash.apply(query, key, value)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
