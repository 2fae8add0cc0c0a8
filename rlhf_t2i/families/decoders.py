"""Decoders of latents: the autoencoders of diffusers, called as the pipelines call them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlhf_t2i.families.base import Decoder
from rlhf_t2i.families.frozen import freeze_convs


class KLDecoder(Decoder):
    """An AutoencoderKL or AutoencoderTiny; images are clamped as DMD2 and ReFL do: a saturated pixel has no gradient.

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
        super().__init__()
        self.vae: Any = freeze_convs(vae)
        self.scaling_factor = float(self.vae.config.scaling_factor)
        self.shift = shift
        self._mean = None if mean is None else torch.tensor(mean).reshape(1, -1, 1, 1)
        self._std = None if std is None else torch.tensor(std).reshape(1, -1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """See :meth:`Decoder.decode`."""
        weights_dtype = next(self.vae.parameters()).dtype
        scaled = latents.float()
        if self._mean is not None and self._std is not None:
            scaled = scaled * self._std.to(scaled) / self.scaling_factor + self._mean.to(scaled)
        else:
            scaled = scaled / self.scaling_factor + self.shift
        image = self.vae.decode(
            scaled.to(weights_dtype).contiguous(memory_format=torch.channels_last), return_dict=False
        )[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def limit_memory(self, slicing: bool, tiling: bool) -> None:
        """See :meth:`Decoder.limit_memory`."""
        if slicing:
            self.vae.enable_slicing()
        if tiling:
            self.vae.enable_tiling()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See :meth:`Decoder.encode`."""
        weights_dtype = next(self.vae.parameters()).dtype
        encoded = self.vae.encode(images.to(weights_dtype) * 2 - 1)
        return (encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents).float()
