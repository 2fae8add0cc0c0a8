"""Train the VAE of emoji64: 64 px to 16x16x8 latents. ``python -m zoo.vae``."""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from zoo import data, device
from zoo.training import join, load_average, train

STEPS, BATCH, CHANNELS = 20000, 16, 8


def build() -> AutoencoderKL:
    """One and a half million parameters, f4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=data.SIZE,
    )


@torch.no_grad()
def warm_start(vae: AutoencoderKL, old: AutoencoderKL) -> None:
    """Take over a VAE of fewer latent channels: the first channels mean the same, the others start near nothing."""
    few, many = old.config.latent_channels, vae.config.latent_channels
    place = torch.cat([torch.arange(few), many + torch.arange(few)])  # means, then log-variances
    for name, new in vae.state_dict().items():
        weight = old.state_dict()[name].float()
        if name.startswith(("encoder.conv_out", "quant_conv")):
            new[many + few :].mul_(0.1)
            if new.ndim > 1 and name.startswith("quant_conv"):
                new[place] = 0
                new[place[:, None], place] = weight
            else:
                new[place] = weight
            if name == "quant_conv.bias":
                new[many + few :] = -6  # little noise: used at once
        elif name in ("post_quant_conv.weight", "decoder.conv_in.weight"):
            new[:few] = 0
            new[: len(weight), :few] = weight
        elif name == "post_quant_conv.bias":
            new[:few] = weight
        else:
            new.copy_(weight)


def batch(world: data.World, seed: int, size: int) -> Tensor:
    """Random composites [size, 3, 64, 64] in [-1, 1]."""
    generator = device.generator(seed)
    index = device.randint(world.drawings.shape[0] * 3, size, generator)
    colours = device.randint(len(data.COLOURS), size, generator)
    return data.compose(world.drawings.flatten(0, 1)[index], colours, generator) * 2 - 1


def loss_fn(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The pixels' loss through a sampled latent, and a small KL term."""
    with device.autocast():
        posterior = vae.encode(images).latent_dist
        output = vae.decode(posterior.sample()).sample
    return pixel_loss(output.float(), images) + 1e-6 * posterior.kl().float().mean()


def pixel_loss(output: Tensor, images: Tensor) -> Tensor:
    """L1 and L2 on pixels, L1 on their local differences (edges)."""
    edges = sum(F.l1_loss(output.diff(dim=d), images.diff(dim=d)) for d in (2, 3))
    return F.l1_loss(output, images) + F.mse_loss(output, images) + edges


@torch.no_grad()
def balance(vae: AutoencoderKL, images: Tensor) -> None:
    """Give each latent channel mean zero and a deviation that follows what it does to the pixels, one on average.

    Exact: what the last 1x1 convolution of the encoder multiplies, the first of the decoder divides.
    """
    z = vae.encode(images).latent_dist.mode()
    mean, std = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
    clean, change = vae.decode(z).sample, []
    for channel in range(z.shape[1]):
        moved = z.clone()
        moved[:, channel] += 0.3 * std[channel] * torch.randn_like(moved[:, channel])
        change.append((vae.decode(moved).sample - clean).square().mean().sqrt())
    target = torch.stack(change).sqrt()
    scale = target / target.square().mean().sqrt() / std
    print("deviation of the channels", [round(v, 3) for v in (scale * std).cpu().tolist()])
    after, before = vae.quant_conv, vae.post_quant_conv
    before.bias += before.weight[:, :, 0, 0] @ mean
    before.weight /= scale[None, :, None, None]
    count = z.shape[1]
    after.bias[:count] = (after.bias[:count] - mean) * scale
    after.weight[:count] *= scale[:, None, None, None]
    after.bias[count:] += 2 * scale.log()


@torch.no_grad()
def export(vae: AutoencoderKL, world: data.World) -> None:
    """Balance the channels, set the scaling factor, measure PSNR on fresh composites and save."""
    balance(vae, batch(world, 10**9 + 1, 96))
    vae.register_to_config(**measure(vae, world))
    vae.half().save_pretrained(data.OUT / "reference/vae")


@torch.no_grad()
def through(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and decoded pictures."""
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in images.split(64)])
    return latents, torch.cat([vae.decode(chunk).sample for chunk in latents.split(64)]).clamp(-1, 1)


def psnr(vae: AutoencoderKL, world: data.World, count: int = 512) -> float:
    """Decibels, over the pixels of fresh composites."""
    images = batch(world, 10**9, count)
    error = (through(vae, images)[1] - images).div(2).square().mean()
    return round(float(-10 * torch.log10(error)), 3)


def measure(vae: AutoencoderKL, world: data.World, count: int = 512) -> dict[str, float]:
    """Print the PSNR on fresh composites, draw some, and return the scaling factor."""
    images = batch(world, 10**9, count)
    latents, output = through(vae, images)
    decibels = -10 * torch.log10((output - images).div(2).square().mean())
    print(f"PSNR {decibels:.2f} dB, latent std {latents.std():.4f}", flush=True)
    pairs = torch.cat([images[:24], output[:24]]) / 2 + 0.5
    data.grid(pairs, 12).resize((12 * 132, 4 * 132), 0).save(data.WORK / "vae.png")
    return {"scaling_factor": round(float(1 / latents.std()), 5)}


def refine(world: data.World, minutes: float, lr: float, export_only: bool) -> None:
    """Train only the decoder of the exported VAE: the latents, and what was trained on them, stay valid."""
    folder = data.OUT / "reference/vae"
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).requires_grad_(False).to(device.DEVICE)
    modules = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).requires_grad_(True)

    def loss(number: int) -> Tensor:
        images = batch(world, 2**40 + number, BATCH)
        with device.autocast():
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.mode()
            output = vae.decode(latents).sample.float()
        return pixel_loss(output, images)

    if export_only:
        average = load_average("vae_decoder", modules)
    else:
        average = train("vae_decoder", modules, loss, minutes=minutes, lr=lr, muon=True, ema_decay=0.998,
                        batch=BATCH * join()[1], warmup=50, constant=math.isinf(minutes))  # fmt: skip
    if join()[0] == 0:
        vae.decoder, vae.post_quant_conv = average["decoder"], average["post_quant_conv"]
        measure(vae.eval(), world)
        vae.half().save_pretrained(folder)


def main() -> None:
    """Train, or export what the checkpoint holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the training (and its schedule) by then")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--warm", help="folder of a VAE with at most as many latent channels to start from")
    parser.add_argument("--decoder", action="store_true", help="train on the exported one's decoder; latents stay")
    parser.add_argument("--export-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    world = data.load()
    if args.decoder:
        refine(world, args.minutes, args.lr, args.export_only)
        return
    modules = nn.ModuleDict({"vae": build()})
    if args.warm:
        warm_start(modules["vae"], AutoencoderKL.from_pretrained(args.warm, torch_dtype=torch.float32))
    if args.export_only:
        average = load_average("vae", modules)
    else:
        average = train(
            "vae", modules, lambda step: loss_fn(modules["vae"], batch(world, step, BATCH)), steps=args.steps,
            minutes=args.minutes, lr=args.lr, muon=True, ema_decay=0.995, batch=BATCH * join()[1],
        )  # fmt: skip
    if join()[0] == 0:
        export(average["vae"].eval(), world)


if __name__ == "__main__":
    main()
