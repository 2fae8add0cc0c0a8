"""Cached VAE latents of fresh composites. ``python -m zoo.latents --shards 40`` (after zoo.vae; resumable).

A shard holds every drawing once, each on a random background, place, scale and flip. Shards never hold the held-out
(name, colour) pairs, except ``latents_held_out.pt``, which holds nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from zoo import data, device, text

FOLDER = "latents"


def prompts() -> list[str]:
    """Every prompt; its number is name x 12 + colour."""
    return [data.prompt(name, colour) for name in data.load().names for colour in data.COLOURS]


@torch.no_grad()
def shard(world: data.World, vae: AutoencoderKL, seed: int, held_out: bool) -> dict[str, Tensor]:
    """Latents [855, C, 16, 16] in fp16, scaled to a standard deviation of one, with prompt numbers and styles."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        [world.is_held_out_pair(i, j) == held_out for j in range(len(data.COLOURS))] for i in range(len(world.names))
    ]
    names = torch.arange(len(world.names)).repeat_interleave(3)
    styles = torch.arange(3).repeat(len(world.names))
    weights = torch.tensor(pairs)[names].float() + 1e-9
    colours = torch.multinomial(weights, 1, generator=generator)[:, 0]
    kept = torch.tensor(pairs)[names, colours]
    latents = []
    for part in torch.arange(len(names)).split(855 if device.on_cuda() else 45):
        images = data.compose(world.drawings[names[part], styles[part]], colours[part], generator) * 2 - 1
        with device.autocast():
            mode = vae.encode(images).latent_dist.mode()
        latents.append((mode.float() * vae.config.scaling_factor).half().cpu())
    found = {"latents": torch.cat(latents), "prompts": names * len(data.COLOURS) + colours, "styles": styles}
    return {key: value[kept] for key, value in found.items()}


class Latents:
    """All shards there are, or the given ones, in the device's memory."""

    def __init__(self, held_out: bool = False, parts: list[dict[str, Tensor]] | None = None) -> None:
        if parts is None:
            folder = data.WORK / FOLDER
            paths = [folder / "held_out.pt"] if held_out else sorted(folder.glob("shard_*.pt"))
            parts = [torch.load(path, weights_only=True) for path in paths]
        self.latents, self.prompts, self.styles = (
            device.here(torch.cat([part[key] for part in parts])) for key in ("latents", "prompts", "styles")
        )
        ids = text.tokenizer()(prompts(), padding="max_length", truncation=True, return_tensors="pt").input_ids
        self.ids = device.here(ids)

    def batch(self, generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        """Latents [B, C, 16, 16] and token ids [B, L]."""
        index = device.randint(len(self.latents), size, generator)
        return self.latents[index].float(), self.ids[self.prompts[index]]


def write(stored: dict[str, Tensor], path: Path) -> None:
    """Atomically."""
    torch.save(stored, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def main() -> None:
    """Write the shards that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--part", type=int, default=0, help="of --parts processes that share the work")
    parser.add_argument("--parts", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = data.WORK / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    world = data.load()
    vae = AutoencoderKL.from_pretrained(data.OUT / "reference/vae", torch_dtype=torch.float32).eval().to(device.DEVICE)
    for number in range(args.part, args.shards, args.parts):
        path = folder / f"shard_{number:03}.pt"
        if not path.is_file():
            write(shard(world, vae, 100 + number, held_out=False), path)
            print(path.name, flush=True)
    if args.part == 0 and not (folder / "held_out.pt").is_file():
        write(shard(world, vae, 2, held_out=True), folder / "held_out.pt")


if __name__ == "__main__":
    main()
