"""Decoders of latents: the autoencoders of diffusers, called as the pipelines call them."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from rlhf_t2i.families.base import Decoder
from rlhf_t2i.families.frozen import freeze_convs


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
