"""What a forward keeps for its backward, counted on the meta device: shapes flow, nothing is computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlhf_t2i.models.frozen import freeze
from rlhf_t2i.models.networks import DTYPES


@dataclass(frozen=True)
class Saved:
    """Bytes autograd holds between a forward and its backward.

    Attributes:
        plain: Everything kept.
        checkpointed: With activation checkpointing by block: the blocks' inputs, and the largest block recomputed.
    """

    plain: int
    checkpointed: int

    def scaled(self, factor: int) -> Saved:
        """For ``factor`` times the batch."""
        return Saved(self.plain * factor, self.checkpointed * factor)


def count(network: nn.Module, call: Callable[[], Any], units: tuple[str, ...]) -> Saved:
    """Run a forward on meta tensors and add up what it saves, parameters left out.

    Args:
        network: On the meta device.
        call: The forward.
        units: Class names of the blocks that are checkpointed as one.
    """
    known = {p.untyped_storage()._cdata for p in network.parameters()}
    alive: list[Tensor] = []  # storages are told apart by address, so none may be freed meanwhile
    stack: list[int] = []
    inside: dict[int, int] = {}
    inputs: dict[int, int] = {}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            alive.append(tensor)
            total += storage.nbytes()
            if stack:
                inside[stack[0]] = inside.get(stack[0], 0) + storage.nbytes()
        return tensor

    def enter(_module: nn.Module, args: tuple[Any, ...]) -> None:
        stack.append(len(inputs) if not stack else stack[0])
        if len(stack) == 1:
            inputs[stack[0]] = args[0].untyped_storage().nbytes() if args and isinstance(args[0], Tensor) else 0

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        stack.pop()

    hooks = []
    for module in network.modules():
        if type(module).__name__ in units:
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), flash_attention():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    # The last block's own tensors exist once more while it is recomputed, beside everyone's inputs.
    checkpointed = total - sum(inside.values()) + sum(inputs.values()) + max(inside.values(), default=0)
    return Saved(total, min(total, checkpointed))


class _Flash(torch.autograd.Function):
    """Keeps what flash attention keeps: query, key, value, output and one number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        raise NotImplementedError("only counted")


@contextmanager
def flash_attention() -> Iterator[None]:
    """On the meta device torch takes the path that keeps the whole attention matrix; GPUs do not."""
    original = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return _Flash.apply(query, key, value)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


UNET_UNITS = ("ResnetBlock2D", "BasicTransformerBlock")
VAE_UNITS = ("ResnetBlock2D", "Attention")
CLIP_UNITS = ("CLIPEncoderLayer",)


def unet(config: dict[str, Any], size: int, dtype: torch.dtype, train: bool, context: int = 77) -> Saved:
    """A UNet's graph for one sample.

    Args:
        config: Its configuration.
        size: Latent height and width.
        dtype: Compute precision.
        train: Whether parameters want gradients; False keeps only what the gradient in x_t needs.
        context: Text tokens.
    """
    from rlhf_t2i.models.architectures import build_on_meta

    network = nn.Module.to(build_on_meta(config), dtype)
    if not train:
        freeze(network)
    with torch.device("meta"):
        x = torch.empty(1, config["in_channels"], size, size, dtype=dtype, requires_grad=not train)
        t = torch.empty(1, dtype=torch.long)
        embeds = torch.empty(1, context, config["cross_attention_dim"], dtype=dtype)
        added = None
        if config.get("addition_embed_type") == "text_time":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            added = {"text_embeds": torch.empty(1, pooled, dtype=dtype), "time_ids": torch.empty(1, 6, dtype=dtype)}
        return count(
            network,
            lambda: network(x, t, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False),
            UNET_UNITS,
        )


def decoder(config: dict[str, Any], size: int, dtype: torch.dtype) -> Saved:
    """The VAE decoder's graph for one sample, for the gradient in the latents."""
    from rlhf_t2i.models.architectures import build_on_meta

    network = freeze(nn.Module.to(build_on_meta(config), dtype))
    with torch.device("meta"):
        latents = torch.empty(1, config.get("latent_channels", 4), size, size, dtype=dtype, requires_grad=True)
        return count(network, lambda: network.decode(latents, return_dict=False), VAE_UNITS)


def clip_image(config: dict[str, Any], dtype: torch.dtype) -> Saved:
    """A CLIP image tower's graph for one image, for the gradient in the pixels."""
    from rlhf_t2i.models.architectures import build_on_meta

    network = nn.Module.to(build_on_meta(config), dtype).requires_grad_(False)
    size = config["vision_config"].get("image_size", 224)
    with torch.device("meta"):
        pixels = torch.empty(1, 3, size, size, dtype=dtype, requires_grad=True)
        return count(network, lambda: network.get_image_features(pixel_values=pixels), CLIP_UNITS)


# Counted by unet() in bf16 at the published size: SDXL's shapes take a while to flow through 70 transformer blocks.
# tests/plan counts SD1.5's again on every run and SDXL's among the slow tests.
KEPT: dict[tuple[str, str], Saved] = {
    ("sdxl", "train"): Saved(7_308_337_024, 732_469_376),
    ("sdxl", "frozen"): Saved(5_021_932_288, 543_262_720),
    ("sd15", "train"): Saved(982_924_800, 232_943_104),
    ("sd15", "frozen"): Saved(648_475_520, 147_261_824),
}


def of_recipe(
    unet_config: Any, vae_config: Any, size: int, precision: str, vae_precision: str = "fp32"
) -> dict[str, Saved]:
    """Graphs of one sample: the UNet when ``train``ed and when ``frozen``, and the VAE's ``decoder``.

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


def of_reward(config: Any, precision: str) -> Saved:
    """The graph of one image through a reward's image tower; nothing where it cannot be built."""
    if not config or (config.get("architectures") or [""])[0] != "CLIPModel":
        return Saved(0, 0)
    return _clip_at(json.dumps(config, sort_keys=True), precision)


@cache
def _unet_at(config: str, size: int, precision: str, train: bool) -> Saved:
    from rlhf_t2i.models import architectures

    parsed = json.loads(config)
    for name, known in (("sdxl", architectures.SDXL_UNET), ("sd15", architectures.SD15_UNET)):
        saved = KEPT.get((name, "train" if train else "frozen"))
        if saved is not None and all(parsed.get(key) == value for key, value in known.items()):
            # Every tensor kept is proportional to the pixels and to the width of a number, near enough.
            ratio = (size / known["sample_size"]) ** 2 * (2 if precision == "fp32" else 1)
            return Saved(int(saved.plain * ratio), int(saved.checkpointed * ratio))
    return unet(parsed, size, DTYPES[precision], train)


@cache
def _decoder_at(config: str, size: int, precision: str) -> Saved:
    return decoder(json.loads(config), size, DTYPES[precision])


@cache
def _clip_at(config: str, precision: str) -> Saved:
    return clip_image(json.loads(config), DTYPES[precision])
