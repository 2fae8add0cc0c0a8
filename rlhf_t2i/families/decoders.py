"""Decoders of latents: the autoencoders of diffusers, called as the pipelines call them."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families.base import Decoder
from rlhf_t2i.families.frozen import freeze_convs
from rlhf_t2i.families.sources import Config, printable


def check_numbers(config: Config, channels: object, place: str) -> None:
    """Check what scales the latents of an autoencoder, before it is built.

    Args:
        config: Of the autoencoder.
        channels: Of its latents.
        place: Its file, for the message.

    Raises:
        UsageError: Not a finite number, or not one per channel; a factor or deviation that is not positive.
    """
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor")
    if not _is_number(scale) or not scale > 0:
        raise UsageError(f"{place}: scaling_factor is {printable(scale)}, not a positive number: the file is damaged")
    if shift is not None and not _is_number(shift):
        raise UsageError(f"{place}: shift_factor is {printable(shift)}, not a number: the file is damaged")
    for key in ("latents_mean", "latents_std"):
        numbers = config.get(key)
        if numbers is None:
            continue
        if not isinstance(numbers, list) or len(numbers) != channels or not all(map(_is_number, numbers)):
            raise UsageError(f"{place}: {key} is not one number per channel: the file is damaged")
        if key == "latents_std" and not min(numbers) > 0:
            raise UsageError(f"{place}: {key} holds numbers that are not positive: the file is damaged")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class VAEDecoder(Decoder):
    """An autoencoder of diffusers behind its pipeline's scaling of latents, see :meth:`unscaled`.

    Images are clamped as DMD2 and ReFL do: a saturated pixel has no gradient.

    Args:
        vae: The autoencoder.
    """

    block_names: ClassVar[tuple[str, ...]] = ("ResnetBlock2D",)

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = freeze_convs(vae)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    @abstractmethod
    def unscaled(self, latents: Tensor) -> Tensor:
        """What the autoencoder decodes, from float32 latents [B, C, h, w]."""

    def decode(self, latents: Tensor) -> Tensor:
        """See :meth:`Decoder.decode`."""
        image = self.vae.decode(self.unscaled(latents.float()).to(self._dtype), return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def limit_memory(self, slicing: bool, tiling: bool) -> None:
        """See :meth:`Decoder.limit_memory`."""
        if slicing:
            self.vae.enable_slicing()
        if tiling:
            self.vae.enable_tiling()


class KLDecoder(VAEDecoder):
    """An AutoencoderKL or AutoencoderTiny.

    Args:
        vae: The autoencoder.
        shift: Added to the latents after they are scaled, from the pipeline's own decoding.
        mean: Per-channel mean of the latents [C], where the pipeline normalizes with one.
        std: Per-channel standard deviation [C].
    """

    block_names: ClassVar[tuple[str, ...]] = ("ResnetBlock2D", "BasicTransformerBlock", "AutoencoderTinyBlock")
    attention_names: ClassVar[tuple[str, ...]] = ("Attention",)

    def __init__(
        self, vae: nn.Module, shift: float = 0.0, mean: list[float] | None = None, std: list[float] | None = None
    ) -> None:
        super().__init__(vae)
        self.scaling_factor = float(self.vae.config.scaling_factor)
        self.shift = shift
        self._mean = None if mean is None else torch.tensor(mean).reshape(1, -1, 1, 1)
        self._std = None if std is None else torch.tensor(std).reshape(1, -1, 1, 1)

    def unscaled(self, latents: Tensor) -> Tensor:
        """See :meth:`VAEDecoder.unscaled`."""
        if self._mean is not None and self._std is not None:
            scaled = latents * self._std.to(latents) / self.scaling_factor + self._mean.to(latents)
        else:
            scaled = latents / self.scaling_factor + self.shift
        return scaled.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See :meth:`Decoder.encode`."""
        encoded = self.vae.encode(images.to(self._dtype) * 2 - 1)
        return (encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents).float()
