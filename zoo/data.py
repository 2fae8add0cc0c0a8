"""The emoji64 world: drawings of three artists' teams, composited on named backgrounds.

``python -m zoo.data --npm FOLDER`` rebuilds ``zoo/emoji64/data`` from the unpacked npm packages (see the card).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zoo import device

ROOT = Path(__file__).parent / "emoji64"
WORK = Path(os.environ.get("ZOO_WORK") or Path(__file__).parent / "work")  # checkpoints; not in git
OUT = Path(os.environ.get("ZOO_OUT") or ROOT)  # where finished models are written
SIZE = 64
STYLES = ("noto", "twemoji", "fluent3d")
CATEGORIES = ("Animals & Nature", "Food & Drink")
COLOURS = {
    "red": (214, 48, 49), "orange": (240, 147, 43), "yellow": (249, 220, 92), "green": (46, 160, 67),
    "teal": (26, 160, 155), "sky blue": (129, 199, 240), "navy": (30, 50, 110), "purple": (125, 60, 180),
    "pink": (246, 160, 190), "brown": (121, 85, 61), "grey": (140, 140, 145), "white": (248, 248, 248),
}  # fmt: skip
_COLUMNS = 17


@dataclass(frozen=True)
class World:
    """Drawings [names, styles, 4, 64, 64] as uint8 RGBA, their names, and the held-out splits."""

    drawings: Tensor
    names: list[str]

    @property
    def held_out_names(self) -> list[str]:
        """A tenth of the names: no DI* run trains on prompts with them."""
        order = np.random.default_rng(64).permutation(len(self.names))
        return sorted(self.names[i] for i in order[: len(self.names) // 10])

    def is_held_out_pair(self, name: int, colour: int) -> bool:
        """15% of the (name, colour) pairs: the reference does not train on them."""
        return bool(_held_out_pairs(len(self.names))[name, colour])


@functools.cache
def _held_out_pairs(names: int) -> np.ndarray:
    return np.random.default_rng(6464).random((names, len(COLOURS))) < 0.15


def prompt(name: str, colour: str) -> str:
    """The prompt of a picture."""
    return f"{name}, on a {colour} background"


@functools.cache
def load() -> World:
    """Read the shipped sheets; the drawings lie on the device."""
    names = json.loads((ROOT / "data/names.json").read_text("utf-8"))
    sheets = []
    for style in STYLES:
        sheet = np.asarray(Image.open(ROOT / f"data/{style}.png").convert("RGBA"))
        rows = sheet.shape[0] // SIZE
        tiles = sheet.reshape(rows, SIZE, _COLUMNS, SIZE, 4).transpose(0, 2, 4, 1, 3).reshape(-1, 4, SIZE, SIZE)
        sheets.append(torch.from_numpy(tiles[: len(names)].copy()))
    return World(device.here(torch.stack(sheets, dim=1)), names)


def compose(drawings: Tensor, colours: Tensor, generator: torch.Generator) -> Tensor:
    """Draw on a background with a random shade, shift, scale and flip.

    Args:
        drawings: RGBA uint8 [B, 4, 64, 64], on the device.
        colours: Indices into :data:`COLOURS`, [B].
        generator: The source of randomness, of the CPU or the device.

    Returns:
        Images [B, 3, 64, 64] in [0, 1].
    """
    batch = len(drawings)
    rgba = drawings.float() / 255
    rgba[:, :3] *= rgba[:, 3:]  # premultiplied: resampling must not bleed colour from transparent pixels
    scale = 1 / (0.82 + 0.16 * device.rand(batch, generator=generator))
    flip = torch.where(device.rand(batch, generator=generator) < 0.5, -1.0, 1.0)
    shift = (device.rand(batch, 2, generator=generator) - 0.5) * 0.14
    theta = torch.zeros(batch, 2, 3, device=rgba.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * flip, scale, shift
    grid = F.affine_grid(theta, [batch, 4, SIZE, SIZE], align_corners=False)
    moved = F.grid_sample(rgba, grid, mode="bilinear", align_corners=False)
    shade = 1 + 0.16 * (device.rand(batch, 1, generator=generator) - 0.5)
    background = (_palette(rgba.device)[device.here(colours)] * shade).clamp(0, 1)[:, :, None, None]
    return (moved[:, :3] + background * (1 - moved[:, 3:])).clamp(0, 1)


@functools.cache
def _palette(where: torch.device) -> Tensor:
    return torch.tensor(list(COLOURS.values())).float().to(where) / 255


def grid(images: Tensor, columns: int) -> Image.Image:
    """A picture of images [B, 3, H, W] in [0, 1] in rows."""
    rows = math.ceil(len(images) / columns)
    height, width = images.shape[-2:]
    sheet = np.full((rows * (height + 2), columns * (width + 2), 3), 255, np.uint8)
    for index, image in enumerate(images.cpu()):
        top, left = (index // columns) * (height + 2), (index % columns) * (width + 2)
        pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        sheet[top : top + height, left : left + width] = pixels
    return Image.fromarray(sheet)


def build(npm: Path) -> None:
    """Write the sheets, names and prompt files from the unpacked npm packages."""
    google = npm / "emoji-datasource-google-16.0.0/package"
    twitter = npm / "emoji-datasource-twitter-16.0.0/package"
    fluent = npm / "lobehub-fluent-emoji-3d-1.1.0/package/assets"
    entries = sorted(json.loads((google / "emoji.json").read_text("utf-8")), key=lambda e: e["sort_order"])
    names, tiles = [], []
    for entry in entries:
        files = [
            google / "img/google/64" / entry["image"],
            twitter / "img/twitter/64" / entry["image"],
            next((p for p in _fluent_names(fluent, entry) if p.is_file()), fluent / "missing"),
        ]
        if entry["category"] not in CATEGORIES or not all(f.is_file() for f in files):
            continue
        names.append(entry["name"].lower())
        tiles.append([Image.open(f).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS) for f in files])
    (ROOT / "data").mkdir(parents=True, exist_ok=True)
    (ROOT / "data/names.json").write_text(json.dumps(names, ensure_ascii=False, indent=0) + "\n", "utf-8")
    for index, style in enumerate(STYLES):
        rows = math.ceil(len(names) / _COLUMNS)
        sheet = Image.new("RGBA", (_COLUMNS * SIZE, rows * SIZE))
        for position, tile in enumerate(tiles):
            sheet.paste(tile[index], ((position % _COLUMNS) * SIZE, (position // _COLUMNS) * SIZE))
        sheet.save(ROOT / f"data/{style}.png", optimize=True)
    _write_prompts()
    print(f"{len(names)} names in {ROOT / 'data'}")


def _fluent_names(folder: Path, entry: dict[str, str]) -> list[Path]:
    codes = [entry["unified"], entry.get("non_qualified") or entry["unified"]]
    return [folder / f"{code.lower()}.webp" for code in codes]


def _write_prompts() -> None:
    world = load()
    held_out = set(world.held_out_names)
    files: dict[str, list[str]] = {"train": [], "held_out": [], "held_out_pairs": []}
    for i, name in enumerate(world.names):
        for j, colour in enumerate(COLOURS):
            if name in held_out:
                files["held_out"].append(prompt(name, colour))
            else:
                files["train"].append(prompt(name, colour))
            if world.is_held_out_pair(i, j):
                files["held_out_pairs"].append(prompt(name, colour))
    order = np.random.default_rng(7)
    (ROOT / "prompts").mkdir(exist_ok=True)
    for file, lines in files.items():
        order.shuffle(lines)
        (ROOT / f"prompts/{file}.txt").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npm", type=Path, default=WORK / "npm")
    build(parser.parse_args().npm)
