"""Rates of this machine, from running the heaviest block of a recipe's own networks (``plan --device here``).

A block runs as it does in a step: in the recipe's precision, its micro-batch and its layouts, forward and backward. So
its rate, in model FLOPs a second, holds norms, activations and launches besides the products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import flops
from rlhf_t2i.families.compiling import compile_blocks
from rlhf_t2i.families.frozen import freeze_convs
from rlhf_t2i.families.published import build_on_meta, unet_inputs
from rlhf_t2i.families.store import DTYPES
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning.devices import Rates
from rlhf_t2i.tools.planning.networks import Networks
from rlhf_t2i.utils.device import default_device

_SECONDS, _MOST = 3.0, 10
"""How long, and how often at most, a block is timed."""


def rates(recipe: Recipe, micro: int) -> Rates:
    """Measure the UNet's and the decoder's rate here, on the GPU where there is one.

    Args:
        recipe: Names networks, precisions and resolution.
        micro: Images at once.

    Raises:
        UsageError: A configuration is not at hand.
    """
    networks = Networks(recipe)
    if networks.unet is None or networks.vae is None:
        raise UsageError("--device here: the configurations of UNet and VAE must be at hand, and one is not")
    size, compiled = networks.latents[1], recipe.optimization.compile
    device = default_device()
    unet = _unet_block(networks.unet, size, micro)
    decoder = _decoder_block(networks.vae, size, micro)
    return Rates(
        unet.rate(device, DTYPES[recipe.optimization.precision], compiled, train=True),
        decoder.rate(device, DTYPES[recipe.models.vae_precision], compiled, train=False),
    )


class _Block:
    """One block of a network on the meta device, with the inputs a forward gives it."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module, self._args, self._kwargs = module, args, kwargs
        self.flops = flops.count(lambda: module(*args, **kwargs))

    def rate(self, device: torch.device, dtype: torch.dtype, compiled: bool, train: bool) -> float:
        """Model FLOPs a second of a forward and backward, trained or frozen."""
        module = _filled(nn.Module.to(self.module, dtype), device).train(train).requires_grad_(train)
        if not train:
            freeze_convs(module)
        if compiled:
            compile_blocks(module, ("ResnetBlock2D", "BasicTransformerBlock"))
        args = _on(self._args, device, dtype)
        kwargs = _on(self._kwargs, device, dtype)

        def run() -> None:
            output = module(*args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            output.backward(torch.ones_like(output))
            module.zero_grad(set_to_none=True)

        return (flops.TRAINED if train else flops.PULLED) * self.flops / _seconds(run, device)


def _heaviest(blocks: Iterable[nn.Module], call: Callable[[], Any]) -> _Block:
    """The block with the most FLOPs in a forward of the whole network, all on the meta device."""
    seen: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    hooks = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((module, args, kwargs)), with_kwargs=True
        )
        for block in blocks
    ]
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    return max((_Block(*item) for item in seen), key=lambda block: block.flops)


def _unet_block(config: dict[str, Any], size: int, batch: int) -> _Block:
    network, inputs = build_on_meta(config), unet_inputs(config, size, batch)
    blocks = [*network.down_blocks, network.mid_block, *network.up_blocks]
    return _heaviest(blocks, lambda: network(**inputs))


def _decoder_block(config: dict[str, Any], size: int, batch: int) -> _Block:
    network = build_on_meta(config)
    inner = network.decoder
    # A tiny autoencoder is a sequence of layers without blocks.
    blocks = [inner.mid_block, *inner.up_blocks] if hasattr(inner, "up_blocks") else [inner]
    with torch.device("meta"):
        latents = torch.empty(batch, config.get("latent_channels", 4), size, size)
        return _heaviest(blocks, lambda: network.decode(latents, return_dict=False))


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


def _on(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Random tensors in place of meta ones, channels last where they are pictures, all wanting gradients."""
    if isinstance(value, Tensor):
        made = torch.randn(value.shape, device=device).to(dtype)
        if made.ndim == 4:
            made = made.contiguous(memory_format=torch.channels_last)
        return made.requires_grad_(True)
    if isinstance(value, tuple):
        return tuple(_on(item, device, dtype) for item in value)
    return {key: _on(item, device, dtype) for key, item in value.items()} if isinstance(value, dict) else value


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
