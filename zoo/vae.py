"""Train the VAE of emoji64: 64 px to 16x16x4 latents. ``python -m zoo.vae``."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from zoo import data
from zoo.training import load_average, train

STEPS, BATCH = 2200, 16


def build() -> AutoencoderKL:
    """One million parameters, f4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=data.SIZE,
    )


def batch(world: data.World, seed: int, size: int) -> Tensor:
    """Random composites [size, 3, 64, 64] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(world.drawings.shape[0] * 3, (size,), generator=generator)
    colours = torch.randint(len(data.COLOURS), (size,), generator=generator)
    return data.compose(world.drawings.flatten(0, 1)[index], colours, generator) * 2 - 1


def loss_fn(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """L1 and L2 on pixels and on their local differences (edges), and a small KL term."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        output = vae.decode(posterior.sample()).sample
    output = output.float()
    pixels = F.l1_loss(output, images) + F.mse_loss(output, images)
    edges = sum(F.l1_loss(output.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
    return pixels + edges + 1e-6 * posterior.kl().float().mean()


@torch.no_grad()
def export(vae: AutoencoderKL, world: data.World) -> None:
    """Set the scaling factor, measure PSNR on fresh composites and save."""
    images = batch(world, 10**9, 512)
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in images.split(64)])
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    output = torch.cat([vae.decode(chunk).sample for chunk in latents.split(64)])
    psnr = -10 * torch.log10(F.mse_loss(output.clamp(-1, 1) / 2, images / 2))
    print(f"PSNR {psnr:.2f} dB, latent std {latents.std():.3f} per channel {latents.std(dim=(0, 2, 3)).tolist()}")
    vae.half().save_pretrained(data.ROOT / "reference/vae")
    pairs = torch.cat([images[:24], output[:24].clamp(-1, 1)]) / 2 + 0.5
    data.grid(pairs, 12).resize((12 * 132, 4 * 132), 0).save(data.WORK / "vae.png")


def main() -> None:
    """Train, or export what the checkpoint holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    world = data.load()
    modules = nn.ModuleDict({"vae": build()})
    if args.export_only:
        average = load_average("vae", modules)
    else:
        average = train(
            "vae", modules, lambda step: loss_fn(modules["vae"], batch(world, step, BATCH)), steps=args.steps, lr=2e-3
        )
    export(average["vae"].eval(), world)


if __name__ == "__main__":
    main()
