"""The independent reader: a small ResNet that names pictures. ``python -m zoo.reader``.

It sees fresh composites of every drawing, name and background, softened, blurred and grainy as a VAE or a young
generator would make them, and is used only to measure: no other training of the zoo sees it.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo import data, device
from zoo.emoji64.reader_network import Reader
from zoo.training import load_average, train

BATCH = 64


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Lost detail (resampling), blur, grain of one or four pixels, small changes of light; half the pictures stay."""
    batch = len(images)
    rand = lambda: device.rand(batch, 1, 1, 1, generator=generator)  # noqa: E731
    side = device.integer(26, 56, generator)
    small = F.interpolate(F.interpolate(images, (side, side), mode="area"), (data.SIZE, data.SIZE), mode="bicubic")
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    how = rand()
    out = torch.where(how < 0.3, images.lerp(small, rand().clamp(min=0.3)), images)
    out = torch.where((how > 0.3) & (how < 0.5), images.lerp(blurred, rand()), out)
    fine = device.randn(*images.shape, generator=generator)
    coarse = F.interpolate(device.randn(batch, 3, 16, 16, generator=generator), scale_factor=4, mode="bilinear")
    out = out + (rand() < 0.4) * rand() * (0.05 * fine + 0.08 * coarse)
    light = 1 + 0.1 * (device.rand(batch, 3, 1, 1, generator=generator) - 0.5)
    return (out * light).clamp(0, 1)


def batch(world: data.World, seed: int, size: int, clean: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Composites [size, 3, 64, 64] in [0, 1] with their names, styles and colours."""
    generator = device.generator(seed)
    index = device.randint(world.drawings.shape[0] * 3, size, generator)
    colours = device.randint(len(data.COLOURS), size, generator)
    images = data.compose(world.drawings.flatten(0, 1)[index], colours, generator)
    return images if clean else soften(images, generator), index // 3, index % 3, colours


def loss_fn(reader: Reader, world: data.World, seed: int, size: int = BATCH) -> Tensor:
    """The sum of three cross-entropies, the name's smoothed a little so that its probability means something."""
    images, *targets = batch(world, seed, size)
    with device.autocast():
        logits = reader(images.contiguous(memory_format=torch.channels_last))
    name, style, colour = (F.cross_entropy(out.float(), target) for out, target in zip(logits, targets, strict=True))
    return name + 0.3 * style + 0.2 * colour


def load() -> Reader:
    """The trained reader: the one in the work folder, else the shipped one."""
    if (data.WORK / "reader.pt").is_file():
        return load_average("reader", nn.ModuleDict({"reader": Reader()}))["reader"]
    shipped = Reader()
    shipped.load_state_dict({key: value.float() for key, value in load_file(data.ROOT / "reader.safetensors").items()})
    return shipped.to(device.DEVICE).eval().requires_grad_(False)


@torch.no_grad()
def report(reader: Reader, images: Tensor, prompts: list[str], names: list[str]) -> dict[str, float]:
    """What the reader finds in pictures of prompts.

    Args:
        reader: As :func:`load` returns it.
        images: [B, 3, 64, 64] in [0, 1].
        prompts: One each.
        names: All names of the world, in order.

    Returns:
        names: Share whose most likely name of 285 is the prompt's. probability: Mean probability of the right name.
        colours: Share with the right background. noto, twemoji, fluent3d: Shares of the styles. style_entropy: Theirs,
        in bits, at most 1.585.
    """
    parts = [p.removesuffix(" background").split(", on a ") for p in prompts]
    right = torch.tensor([names.index(name) for name, _ in parts])
    colour = torch.tensor([list(data.COLOURS).index(c) for _, c in parts])
    logits = [reader(chunk.float()) for chunk in images.split(64)]
    name, style, ground = (torch.cat(part).cpu() for part in zip(*logits, strict=True))
    share = torch.bincount(style.argmax(1), minlength=3).float() / len(images)
    result = {
        "names": float((name.argmax(1) == right).float().mean()),
        "probability": float(name.softmax(1)[torch.arange(len(right)), right].mean()),
        "colours": float((ground.argmax(1) == colour).float().mean()),
        **{label: float(value) for label, value in zip(data.STYLES, share, strict=True)},
        "style_entropy": float(-(share * share.clamp(min=1e-9).log2()).sum()),
        "pictures": len(images),
    }
    return {key: round(value, 4) for key, value in result.items()}


@torch.no_grad()
def check(reader: Reader, world: data.World, vae: nn.Module | None = None, count: int = 1710) -> dict[str, float]:
    """Accuracy on true drawings, fresh and, given a VAE, through it."""
    images, name, _, colour = batch(world, 10**9, count, clean=True)
    if vae is not None:
        parts = [vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample for x in images.split(64)]
        images = (torch.cat(parts) / 2 + 0.5).clamp(0, 1)
    colours = list(data.COLOURS)
    prompts = [
        data.prompt(world.names[n], colours[c]) for n, c in zip(name.cpu().tolist(), colour.cpu().tolist(), strict=True)
    ]
    return report(reader, images, prompts, world.names)


def main() -> None:
    """Train (or resume) and measure on true drawings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=16)
    parser.add_argument("--check", action="store_true", help="only measure")
    parser.add_argument("--export", action="store_true", help="only write its average as emoji64/reader.safetensors")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.export:
        weights = {name: value.half().contiguous() for name, value in load().state_dict().items()}
        save_file(weights, data.OUT / "reader.safetensors")
        return
    world = data.load()
    modules = nn.ModuleDict({"reader": Reader(len(world.names))}).to(memory_format=torch.channels_last)
    if not args.check:
        train("reader", modules, lambda step: loss_fn(modules["reader"], world, step), steps=10**6,
              minutes=args.minutes, lr=2e-3, ema_decay=0.995, weight_decay=0.02)  # fmt: skip
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(data.ROOT / "reference/vae", torch_dtype=torch.float32).eval().to(device.DEVICE)
    print("true drawings", check(load(), world))
    print("through the VAE", check(load(), world, vae))


if __name__ == "__main__":
    main()
