"""Video autoencoders that decode a single frame: their causal convolutions become two-dimensional ones.

A causal convolution pads its first frame with zeros in time, so that of its kernel the last slice alone meets data. On
one frame the two-dimensional convolution of that slice gives the same numbers for a third of the work, and can be a
:class:`~rlhf_t2i.families.frozen.FrozenConv2d` in the memory format of images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlhf_t2i.families.decoders import VAEDecoder


class OneFrameDecoder(VAEDecoder):
    """An AutoencoderKLQwenImage, whose latents are normalized channel by channel."""

    block_names = ("QwenImageResidualBlock", "QwenImageAttentionBlock")

    def __init__(self, vae: nn.Module) -> None:
        super().__init__(for_one_frame(vae))
        self._mean, self._std = (
            torch.tensor(numbers, device="cpu").reshape(1, -1, 1, 1, 1)
            for numbers in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )

    def unscaled(self, latents: Tensor) -> Tensor:
        """See :meth:`VAEDecoder.unscaled`; [B, C, 1, h, w]."""
        return latents.unsqueeze(2) * self._std.to(latents.device) + self._mean.to(latents.device)

    def decode(self, latents: Tensor) -> Tensor:
        """See :meth:`Decoder.decode`."""
        return super().decode(latents).squeeze(2)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See :meth:`Decoder.encode`."""
        return self.vae.encode(images.to(self._dtype).unsqueeze(2) * 2 - 1).latent_dist.mean.squeeze(2).float()


def for_one_frame(vae: nn.Module) -> nn.Module:
    """Turn an ``AutoencoderKLQwenImage`` into one for single frames, in place.

    Latents and images keep their frame axis, of length one. Outputs and gradients are those of the autoencoder before.
    """
    for name, part in list(vae.named_children()):
        if name in ("encoder", "decoder"):
            setattr(vae, name, _WithoutCache(part))
    for module in list(vae.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, nn.Conv3d):
                setattr(module, name, _FrameConv(part))
    return vae


class _WithoutCache(nn.Module):
    """An encoder or decoder that ignores the cache of earlier frames, which would break recomputed layers."""

    def __init__(self, coder: nn.Module) -> None:
        super().__init__()
        self.coder = coder

    def forward(self, x: Tensor, **_cache: object) -> Tensor:
        return self.coder(x)


class _FrameConv(nn.Module):
    """What a causal ``nn.Conv3d`` does to the first frame [B, C, 1, h, w] of a video."""

    def __init__(self, causal: nn.Conv3d) -> None:
        super().__init__()
        width, _, height, *_ = causal._padding  # of both sides each; its ``padding`` is zero
        self.conv = nn.Conv2d(
            causal.in_channels, causal.out_channels, causal.kernel_size[1:], causal.stride[1:], (height, width),
            device="meta",
        )  # fmt: skip
        self.conv.weight = nn.Parameter(causal.weight.detach()[:, :, -1].clone())
        self.conv.bias = nn.Parameter(causal.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.squeeze(2)).unsqueeze(2)
