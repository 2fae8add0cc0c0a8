"""Memory of activations, counted on the meta device: shapes flow forward and backward, nothing is computed.

What convolutions and attention borrow while they run is their libraries' choice and not counted.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_t2i.families.frozen import freeze_convs
from rlhf_t2i.families.store import DTYPES
from rlhf_t2i.plugins.base import Footprint


@dataclass(frozen=True)
class Peak:
    """The most bytes of activations alive at once in a forward and the backward to its input.

    Attributes:
        plain: Everything kept for the backward.
        checkpointed: With activation checkpointing as the roles do it: kept inputs, and what recomputing a layer and
            its gradients take.
        forward: Of a forward alone, without gradient; 0 where it was not counted.
    """

    plain: int
    checkpointed: int
    forward: int = 0


class _Alive(TorchDispatchMode):
    """Adds up the storages that operators make while they live; what convolutions borrow inside is not seen."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.highest = self._now = 0
        # By address, which is a storage's own while it lives.
        self._known = {t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in self._known:
                storage = made.untyped_storage()
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.highest = max(self.highest, self._now)
        return result

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size


def peak(network: nn.Module, call: Callable[[], tuple[Tensor, Tensor]], gradient: bool = True) -> int:
    """Run a forward and the backward to its input, on meta tensors or real ones.

    Args:
        network: Its parameters and buffers are left out, and so are gradients of parameters.
        call: Makes the input and gives (input, output).
        gradient: Whether there is a backward; else nothing is kept for one.
    """
    with flash_attention(), _Alive(network) as alive, torch.set_grad_enabled(gradient):
        leaf, output = call()
        if gradient:
            torch.autograd.grad(output, leaf, torch.empty_like(output))
        del leaf, output
    return alive.highest


class _Flash(torch.autograd.Function):
    """Keeps what flash attention keeps: query, key, value, output and one number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def flash_attention() -> Iterator[None]:
    """On the meta device torch takes the path that keeps the whole attention matrix; GPUs and CPUs do not."""
    original = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return _Flash.apply(query, key, value)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def unet(config: dict[str, Any], size: int, dtype: torch.dtype, train: bool, context: int = 77) -> Peak:
    """A UNet on one sample.

    Args:
        config: Its configuration.
        size: Latent height and width.
        dtype: Compute precision.
        train: Whether parameters want gradients; False keeps only what the gradient in x_t needs.
        context: Text tokens.
    """
    from rlhf_t2i.families.published import unet_inputs

    network = nn.Module.to(_on_meta(config), dtype)
    if not train:
        freeze_convs(network).to(memory_format=torch.channels_last)

    def call() -> tuple[Tensor, Tensor]:
        inputs = unet_inputs(config, size, context=context, dtype=dtype)
        x = inputs.pop("sample").requires_grad_(True)
        return x, network(x.contiguous(memory_format=torch.channels_last), **inputs)[0]

    plain = peak(network, call)
    network.enable_gradient_checkpointing()
    network.train()  # diffusers checkpoints only networks in training mode
    return Peak(plain, peak(network, call))


def decoder(config: dict[str, Any], size: int, dtype: torch.dtype) -> Peak:
    """The VAE decoder on one sample, for the gradient in the latents."""
    network = freeze_convs(nn.Module.to(_on_meta(config), dtype)).to(memory_format=torch.channels_last)

    def call() -> tuple[Tensor, Tensor]:
        with torch.device("meta"):
            latents = torch.empty(1, config.get("latent_channels", 4), size, size, dtype=dtype, requires_grad=True)
        image = network.decode(latents.contiguous(memory_format=torch.channels_last), return_dict=False)[0]
        return latents, (image.float() / 2 + 0.5).clamp(0, 1)

    return _frozen_peak(network, call)


def of_reward(footprint: Footprint | None, precision: str, size: int) -> Peak:
    """A reward's network on one image of ``size`` pixels, for the gradient in it; zeros if it is not known."""
    if footprint is None:
        return Peak(0, 0)
    dtype = DTYPES[precision]
    with torch.device("meta"):
        network = nn.Module.to(footprint.build(), dtype).requires_grad_(False)

    def call() -> tuple[Tensor, Tensor]:
        with torch.device("meta"):
            images = torch.empty(1, 3, size, size, dtype=dtype, requires_grad=True)
        return images, network(images)

    return _frozen_peak(network, call)


def _frozen_peak(network: nn.Module, call: Callable[[], tuple[Tensor, Tensor]]) -> Peak:
    """Without and with checkpointing as rewards do it."""
    from rlhf_t2i.families.recomputing import checkpoint_layers

    plain, forward = peak(network, call), peak(network, call, gradient=False)
    checkpoint_layers(network)
    return Peak(plain, peak(network, call), forward)


def _on_meta(config: dict[str, Any]) -> Any:
    from rlhf_t2i.families.published import build_on_meta

    return build_on_meta(config)


# Counted by unet() in bf16 at the published size: SDXL's shapes take a while to flow through 70 transformer blocks.
# tests/plan counts SD1.5's again on every run and SDXL's among the slow tests.
COUNTED: dict[tuple[str, str], Peak] = {
    ("sdxl", "train"): Peak(7_339_931_028, 808_897_280),
    ("sdxl", "frozen"): Peak(5_074_947_476, 599_024_256),
    ("sd15", "train"): Peak(998_751_616, 246_973_056),
    ("sd15", "frozen"): Peak(680_030_976, 176_808_448),
}


def of_recipe(
    unet_config: Any, vae_config: Any, size: int, precision: str, vae_precision: str = "fp32"
) -> dict[str, Peak]:
    """Of one sample: the UNet when ``train``ed and when ``frozen``, and the VAE's ``decoder``.

    Args:
        unet_config: The UNet's configuration, or None where it is not at hand.
        vae_config: The VAE's.
        size: Latent height and width.
        precision: ``fp32`` or ``bf16``, of the UNet.
        vae_precision: Of the decoder.
    """
    found = {}
    if unet_config is not None:
        for kind in ("train", "frozen"):
            found[kind] = _unet_at(json.dumps(unet_config, sort_keys=True), size, precision, kind == "train")
    if vae_config is not None:
        found["decoder"] = _decoder_at(json.dumps(vae_config, sort_keys=True), size, vae_precision)
    return found


@cache
def _unet_at(config: str, size: int, precision: str, train: bool) -> Peak:
    from rlhf_t2i.families import published

    parsed = json.loads(config)
    for name, known in (("sdxl", published.SDXL_UNET), ("sd15", published.SD15_UNET)):
        counted = COUNTED.get((name, "train" if train else "frozen"))
        if counted is not None and all(parsed.get(key) == value for key, value in known.items()):
            # Every tensor is proportional to the pixels and to the width of a number, near enough.
            ratio = (size / known["sample_size"]) ** 2 * (2 if precision == "fp32" else 1)
            return Peak(int(counted.plain * ratio), int(counted.checkpointed * ratio))
    return unet(parsed, size, DTYPES[precision], train)


@cache
def _decoder_at(config: str, size: int, precision: str) -> Peak:
    return decoder(json.loads(config), size, DTYPES[precision])
