"""Pictures on the disk: what is scored is what a person can look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlhf_t2i.errors import UsageError


def png(image: Tensor) -> bytes:
    """An image [3, H, W] in [0, 1] as a PNG file."""
    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def read_images(paths: Sequence[Path], square: int | None = None) -> Tensor:
    """Images [B, 3, H, W] in [0, 1]; with ``square`` cut to the center square and scaled (Lanczos) to that side."""
    tensors = []
    for path in paths:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        if square is not None:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).resize((square, square), Image.Resampling.LANCZOS)
        tensors.append(torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1))
    return torch.stack(tensors)


def picture_files(folder: Path) -> list[Path]:
    """The pictures below a folder, by name.

    Raises:
        UsageError: Fewer than two.
    """
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if len(found) < 2:
        raise UsageError(f"--real: {folder} holds {len(found)} pictures: at least two are needed")
    return found
