"""Images as files: the one conversion between tensors and 8-bit pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rlhf_t2i.errors import UsageError, first_line

_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm",
)  # fmt: skip


def to_8_bits(images: Tensor) -> Tensor:
    """Round images in [0, 1] to the nearest of 256 levels: uint8, same shape. NaN becomes 0."""
    return (images.detach().float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1) * 255).round().to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """An image [3, H, W] in [0, 1] as a PIL image."""
    return Image.fromarray(to_8_bits(image).permute(1, 2, 0).cpu().numpy())


def png(image: Tensor | Image.Image) -> bytes:
    """An image [3, H, W] in [0, 1], or a PIL image, as a PNG file."""
    buffer = io.BytesIO()
    (to_pil(image) if isinstance(image, Tensor) else image).save(buffer, "PNG")
    return buffer.getvalue()


def grid(images: Sequence[Image.Image], columns: int = 8, gap: int = 2) -> Image.Image:
    """Images of one size in rows on white."""
    width, height = images[0].size
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        sheet.paste(image, ((index % columns) * (width + gap), (index // columns) * (height + gap)))
    return sheet


def read(paths: Sequence[Path], square: int | None = None) -> Tensor:
    """Images [B, 3, H, W] in [0, 1].

    16-bit gray levels are scaled to 8 bits; transparent pixels show white; photos are upright, as a viewer shows them.

    Args:
        paths: Image files.
        square: Cut the center square and scale it (Lanczos) to that side in pixels.

    Raises:
        UsageError: A file is no image that Pillow reads, or has several frames; or the images differ in size.
    """
    images = [_read(path) for path in paths]
    if square is not None:
        images = [_center_square(image, square) for image in images]
    odd = next((path for path, image in zip(paths, images, strict=True) if image.size != images[0].size), None)
    if odd is not None:
        raise UsageError(f"{odd} has another size than {paths[0]}")
    return _to_tensor(images)


def from_pil(image: Image.Image) -> Tensor:
    """A PIL image as a tensor [1, 3, H, W] in [0, 1]; modes are converted as :func:`read` does.

    Raises:
        UsageError: The image holds floating-point gray levels.
    """
    return _to_tensor([_rgb(image, "the image")])


def find(folder: Path) -> list[Path]:
    """The image files below a folder, sorted; hidden files and folders are left out."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                raise UsageError(f"{path} holds {frames} frames: give single images")
            return _rgb(ImageOps.exif_transpose(image), str(path))
    except UsageError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        raise UsageError(f"{path} cannot be read as an image: {first_line(error)}") from None


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.float64).clip(0, 65535) / 257  # Pillow itself would clip at 255
        return Image.fromarray(levels.round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UsageError(f"{name} holds floating-point gray levels of unknown range: give 8- or 16-bit images")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size as [B, 3, H, W] in [0, 1]."""
    arrays = [np.asarray(image, dtype=np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def _center_square(image: Image.Image, side: int) -> Image.Image:
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    return image.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.LANCZOS)
