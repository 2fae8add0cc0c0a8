"""Calling the networks: denoisers, the one-step generator and the latent decoder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm.schedules import NoiseSchedule
from rlhf_t2i.families.conditioning import Conditioning
from rlhf_t2i.families.frozen import freeze

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def predict(network: Callable[..., Any], x_t: Tensor, t: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
    """The raw output of a UNet [B, C, h, w] in float32.

    Args:
        network: A UNet2DConditionModel, or the training engine that wraps one.
        x_t: Latents [B, C, h, w].
        t: Integer timesteps [B].
        cond: The conditioning of the batch.
        dtype: The compute precision. float32 weights run under autocast, weights of that dtype as they are.
    """
    module: Any = getattr(network, "module", network)
    weights = next(module.parameters()).dtype
    mixed = weights == torch.float32 and dtype != torch.float32
    with torch.autocast(x_t.device.type, dtype) if mixed else nullcontext():
        # Convolutions then keep channels last to the end, whatever the layout of their weights (which ZeRO flattens).
        latents = x_t.to(weights).contiguous(memory_format=torch.channels_last)
        output = network(latents, t.to(x_t.device), return_dict=False, **cond.unet_kwargs(weights))
    return output[0].float()


def one_step(
    network: Callable[..., Any],
    z: Tensor,
    cond: Conditioning,
    timestep: int,
    schedule: NoiseSchedule,
    dtype: torch.dtype,
) -> Tensor:
    """The one-step generator ``x_0 = (z - g_t e(z, t)) / a_t`` at a fixed t (algorithm.md section 5).

    Equals diffusers' LCMScheduler with one step at that timestep and guidance 0; z has unit variance and is not
    scaled.
    """
    t = torch.full((len(z),), timestep, device=z.device, dtype=torch.long)
    return schedule.to_x0(predict(network, z, t, cond, dtype), z, t)


class LatentDecoder(nn.Module):
    """The VAE's decoder: latents [B, C, h, w] to images [B, 3, H, W] in [0, 1].

    Clamped as DMD2 and ReFL do: a saturated pixel passes no gradient.

    Args:
        vae: An AutoencoderKL or AutoencoderTiny.
    """

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = freeze(vae)
        config: Any = vae.config
        self.scaling_factor = float(config.scaling_factor)
        self.shift_factor = float(getattr(config, "shift_factor", None) or 0.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], float32; gradients flow."""
        weights = next(self.vae.parameters()).dtype
        scaled = latents.float() / self.scaling_factor + self.shift_factor
        latents = scaled.to(weights).contiguous(memory_format=torch.channels_last)
        image = self.vae.decode(latents, return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)
