"""Rates of this machine, from running the heaviest block of a recipe's own networks (``plan --device here``).

A block runs as it does in a step: in the recipe's precision, its micro-batch and its layouts, forward and backward. So
its rate, in model FLOPs per second, includes norms, activations and launches besides the products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rlhf_t2i.families import counting
from rlhf_t2i.families.compiling import compile_blocks
from rlhf_t2i.families.counting import Network
from rlhf_t2i.families.footprints import Footprints
from rlhf_t2i.families.frozen import freeze_convs
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning.devices import Rates
from rlhf_t2i.utils.device import default_device

_SECONDS, _MOST = 3.0, 10
"""How long, and how often at most, a block is timed."""


def rates(recipe: Recipe, micro: int) -> Rates:
    """Measure the rates of the denoising network and of the decoder here, on the GPU if there is one.

    Args:
        recipe: Names networks, precisions and sizes.
        micro: Images at once.

    Raises:
        UsageError: A configuration is missing or damaged.
    """
    networks = Footprints(recipe)
    family, compiled = networks.store.family, recipe.optimization.compile

    def rate(network: Network, block_names: tuple[str, ...], train: bool) -> float:
        return _Block(network, micro).rate(block_names if compiled else (), train)

    decoder = networks.store.family.build_decoder(networks.store.vae)
    return Rates(
        rate(networks.network(), family.block_names, True), rate(networks.decoder(), decoder.block_names, False)
    )


class _Block:
    """The block with the most FLOPs in a forward of a network, with the inputs that the forward gives it."""

    def __init__(self, network: Network, batch: int) -> None:
        built, seen = network.build(), dict[nn.Module, tuple[tuple[object, ...], dict[str, object]]]()
        hooks = [
            block.register_forward_pre_hook(lambda m, args, kwargs: seen.update({m: (args, kwargs)}), with_kwargs=True)
            for block in _outermost_blocks(built)
        ]
        with torch.no_grad():
            network.call(built)
        for hook in hooks:
            hook.remove()

        def flops(block: nn.Module) -> int:
            args, kwargs = seen[block]
            return counting.flops(lambda: block(*args, **kwargs))

        self._module = max(seen, key=flops)
        self._flops = batch * flops(self._module)
        self._args, self._kwargs = seen[self._module]
        self._batch = batch

    def rate(self, compiled: tuple[str, ...], train: bool) -> float:
        """Model FLOPs per second of a forward and backward, trained or frozen."""
        device = default_device()
        module = _filled(self._module, device).train(train).requires_grad_(train)
        if not train:
            freeze_convs(module)
        if compiled:
            compile_blocks(module, compiled)
        args, kwargs = tree_map(partial(_filled_input, batch=self._batch, device=device), (self._args, self._kwargs))

        def run() -> None:
            output = module(*args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            output.backward(torch.ones_like(output))
            module.zero_grad(set_to_none=True)

        return (3 if train else 2) * self._flops / _seconds(run, device)


def _outermost_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The entries of a network's outermost ``nn.ModuleList``; the network itself where it has none."""
    lists: list[nn.ModuleList] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                lists.append(child)
            else:
                search(child)

    search(network)
    found = [
        block for entries in lists for block in entries if block is not None and any(True for _ in block.parameters())
    ]
    yield from found or [network]


def _filled(module: nn.Module, device: torch.device) -> nn.Module:
    """Memory for a meta module's weights, with values that keep numbers in range."""
    module.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
    return module


def _filled_input(value: object, batch: int, device: torch.device) -> object:
    """A random tensor of ``batch`` samples for a meta one of one; channels last where it is an image."""
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return torch.zeros(value.shape, dtype=value.dtype, device=device)
    shape = (batch, *value.shape[1:]) if value.ndim and value.shape[0] == 1 else value.shape
    made = torch.randn(shape, device=device).to(value.dtype)
    if made.ndim == 4:
        made = made.contiguous(memory_format=torch.channels_last)
    return made.requires_grad_(True)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Of one call, the mean over a few after a first one."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    run()
    synchronize()
    began, times = time.perf_counter(), 0
    while times < _MOST and (times == 0 or time.perf_counter() - began < _SECONDS):
        run()
        synchronize()
        times += 1
    return (time.perf_counter() - began) / times
