"""Qwen2-VL's image processor in torch operations: resize to whole patches, normalize, cut into patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_t2i.plugins.precision import at_least_float32
from rlhf_t2i.plugins.preprocessing import CLIP_MEAN, CLIP_STD, normalize, resize

_FIXED = {"do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
"""Switches of the processor that published models leave as they are; others are refused."""


@dataclass(frozen=True)
class QwenPreprocess:
    """The steps of transformers' ``Qwen2VLImageProcessor`` on images in [0, 1]; gradients flow.

    The processor resizes 8-bit images and rounds after each of two passes; here nothing is rounded. Without a resize
    the two agree to float32's accuracy.

    Args:
        min_pixels: A smaller image is enlarged.
        max_pixels: A larger image is shrunk. Where both bounds are equal, the size is the nearest one that fits.
        patch: Pixels of a patch's side.
        merge: Patches per side that the model merges into one token: sides are multiples of ``patch * merge``.
        frames: How often an image is repeated in its patches, since the model reads videos in pairs of frames.
        mean: Subtracted per channel.
        std: Divided by.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 1280 * 28 * 28
    patch: int = 14
    merge: int = 2
    frames: int = 2
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QwenPreprocess:
        """Read a transformers ``preprocessor_config.json`` (or ``processor_config.json``).

        Raises:
            ValueError: It asks for what this class does not do.
        """
        config = config.get("image_processor", config)
        kind = str(config.get("image_processor_type") or "Qwen2VLImageProcessor")
        if not kind.startswith("Qwen2VLImageProcessor"):
            raise ValueError(f"the image processor {kind!r} is not supported: use Qwen2VLImageProcessor")
        for key, fixed in _FIXED.items():
            if config.get(key, fixed) not in (fixed, None):
                raise ValueError(f"the image processor's {key} {config[key]!r} is not supported: use {fixed!r}")
        size = config.get("size") or {}
        smallest = config.get("min_pixels") or size.get("shortest_edge") or cls.min_pixels
        largest = config.get("max_pixels") or size.get("longest_edge") or cls.max_pixels
        return cls(
            min_pixels=_positive(smallest, "min_pixels"),
            max_pixels=_positive(largest, "max_pixels"),
            patch=_positive(config.get("patch_size", cls.patch), "patch_size"),
            merge=_positive(config.get("merge_size", cls.merge), "merge_size"),
            frames=_positive(config.get("temporal_patch_size", cls.frames), "temporal_patch_size"),
            mean=_channels(config, "image_mean") or cls.mean,
            std=_channels(config, "image_std") or cls.std,
        )

    def limited(self, max_pixels: int) -> QwenPreprocess:
        """The same with at most so many pixels."""
        return replace(self, max_pixels=min(max_pixels, self.max_pixels))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize.

        Raises:
            ValueError: One side is over 200 times the other.
        """
        # The module without torchvision, which the other one needs.
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        return smart_resize(height, width, self.patch * self.merge, self.min_pixels, self.max_pixels)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.size(height, width)
        return height // self.patch, width // self.patch

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to patches [B, rows * columns, 3 * frames * patch^2], in float32 or better."""
        images = at_least_float32(images)
        return self.patches(normalize(resize(images, self.size(*images.shape[-2:])), self.mean, self.std))

    def patches(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, h, w] of whole patches, flattened; the patches of one merged token follow each other."""
        side, merge = self.patch, self.merge
        blocks = pixels.unflatten(3, (-1, merge, side)).unflatten(2, (-1, merge, side))
        # [B, 3, rows/merge, merge, side, columns/merge, merge, side], and frames after the channels.
        ordered = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        return torch.cat([ordered] * self.frames, 6).flatten(5).flatten(1, 4)


def _positive(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"the image processor's {key} {value!r} is not a positive integer")
    return value


def _channels(config: Mapping[str, Any], key: str) -> tuple[float, ...] | None:
    values = config.get(key)
    if values is None:
        return None
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ValueError(f"the image processor's {key} {values!r} is not three numbers")
    return tuple(float(value) for value in values)
