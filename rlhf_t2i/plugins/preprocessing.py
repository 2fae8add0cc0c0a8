"""Differentiable image preprocessing: the steps of CLIP's, BLIP's and ViT's processors in torch operations.

The libraries' processors use PIL (resize and crop on uint8), which cuts the gradient. These functions agree with them
within their rounding, and with the same filter without rounding within 1e-3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, cast

import torch
from torch import Tensor
from torch.nn import functional

from rlhf_t2i.utils.device import send

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_FILTERS: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side, crop the center, normalize; hashable, so it can be a cache key.

    Args:
        resize: Pixels of the shorter side, or (height, width); None keeps the size.
        crop: (height, width) cut from the center; None keeps everything.
        mean: Subtracted per channel, after scaling to [0, 1].
        std: Divided by.
        filter: ``bicubic`` or ``bilinear``, always antialiased.
        pad: Instead of cropping, shrink the longer side to ``resize`` and fill the border with black before
            normalizing (open_clip's ResizeMaxSize, used by HPSv2).
        clamp: Cut the bicubic filter's overshoot to [0, 1], as processors that work on uint8 do.
        crop_rounding: How half a pixel is rounded: ``floor`` (transformers) or ``nearest`` (torchvision).
    """

    resize: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    filter: Literal["bilinear", "bicubic"] = "bicubic"
    pad: bool = False
    clamp: bool = True
    crop_rounding: Literal["floor", "nearest"] = "floor"

    @classmethod
    def square(
        cls, size: int, *, pad: bool = False, clamp: bool = True, crop_rounding: Literal["floor", "nearest"] = "floor"
    ) -> Preprocess:
        """The usual preprocessing for a square model input of ``size`` pixels."""
        return cls(resize=size, crop=(size, size), pad=pad, clamp=clamp, crop_rounding=crop_rounding)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Preprocess:
        """Read a transformers ``preprocessor_config.json`` (or ``processor_config.json``).

        Raises:
            ValueError: The configuration asks for a step, a filter or a size that this class does not know.
        """
        own = config.get("image_processor", config)
        if not isinstance(own, dict):
            raise ValueError("the image processor's configuration is not a mapping")
        settings = _with_defaults(own)
        unknown = next((key for key in _UNSUPPORTED if own.get(key)), None)
        if unknown:
            raise ValueError(f"the image processor's {unknown} is not supported: only resize, crop and normalize are")
        resample = settings["resample"]
        if settings["do_resize"] and resample not in _FILTERS:
            raise ValueError(f"the image processor's resample {resample!r} is not supported: use 2 or 3")
        mean, std = _statistics(settings)
        return cls(
            resize=_resize_size(settings["size"]) if settings["do_resize"] else None,
            crop=_height_width(settings["crop_size"], "crop_size") if settings["do_center_crop"] else None,
            mean=mean,
            std=std,
            filter=_FILTERS.get(resample, "bicubic"),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to normalized pixels [B, 3, h, w], same dtype; gradients flow."""
        images = self._resized(images)
        if self.crop is not None:
            images = center_crop(images, self.crop, self.crop_rounding)
        return normalize(images, self.mean, self.std)

    def _resized(self, images: Tensor) -> Tensor:
        if self.resize is None:
            return images
        height, width = images.shape[-2:]
        if isinstance(self.resize, tuple):
            return resize(images, self.resize, self.filter, self.clamp)
        if self.pad:
            scale = self.resize / max(height, width)
            # Python's round, as open_clip.
            return resize(images, (round(height * scale), round(width * scale)), self.filter, self.clamp)
        short = min(height, width)
        target = (
            (self.resize, int(self.resize * width / height))
            if height == short
            else (int(self.resize * height / width), self.resize)
        )
        return resize(images, target, self.filter, self.clamp)


class _Processor(TypedDict):
    """What is read of an image processor's configuration."""

    do_resize: bool
    size: object
    resample: int
    do_center_crop: bool
    crop_size: object
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: Sequence[float]
    image_std: Sequence[float]


_CLIP: _Processor = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
"""Defaults of CLIP's processor in transformers."""

_VIT: _Processor = {
    **_CLIP,
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "do_center_crop": False,
    "image_mean": (0.5,) * 3,
    "image_std": (0.5,) * 3,
}
_DEFAULTS: dict[str, _Processor] = {
    "CLIP": _CLIP,
    "ViT": _VIT,
    "Siglip": {**_VIT, "resample": 3},
    "Blip": {**_CLIP, "size": {"height": 384, "width": 384}, "do_center_crop": False},
    "Bit": _CLIP,
}
"""Defaults by ``image_processor_type`` without its ending: what a configuration leaves out is its class's."""

_KIND = re.compile(r"(.*?)(ImageProcessor(Fast|Pil)?|FeatureExtractor)?")

_UNSUPPORTED = (
    "crop_pct",
    "do_pad",
    "do_thumbnail",
    "do_align_long_axis",
    "do_reduce_labels",
    "do_image_splitting",
    "do_flip",
)


def _with_defaults(config: Mapping[str, object]) -> _Processor:
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "CLIP"
    named = _KIND.fullmatch(str(kind))
    defaults = _DEFAULTS.get(named[1]) if named else None
    if defaults is None:
        raise ValueError(f"the image processor {kind!r} is not supported: use one of {', '.join(_DEFAULTS)}")
    chosen = {**defaults, **{key: value for key, value in config.items() if value is not None}}
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if not isinstance(chosen[key], bool):  # of "no" every library makes a yes
            raise ValueError(f"the image processor's {key} {chosen[key]!r} is neither true nor false")
    return cast(_Processor, chosen)


def _statistics(config: _Processor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for images in [0, 1], whatever the processor multiplies its bytes by."""
    factor = 255 * (float(config["rescale_factor"]) if config["do_rescale"] else 1.0)
    if factor <= 0:
        raise ValueError(f"the image processor's rescale_factor {config['rescale_factor']} is not positive")
    mean, std = (config["image_mean"], config["image_std"]) if config["do_normalize"] else ((0.0,) * 3, (1.0,) * 3)
    for name, values in (("image_mean", mean), ("image_std", std)):
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise ValueError(f"the image processor's {name} {values!r} is not three numbers")
    if not all(float(value) > 0 for value in std):
        raise ValueError(f"the image processor's image_std {std!r} is not positive")
    return tuple(float(value) / factor for value in mean), tuple(float(value) / factor for value in std)


def _resize_size(size: object) -> int | tuple[int, int]:
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        size = size["shortest_edge"]
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    return _height_width(size, "size")


def _height_width(size: object, name: str) -> tuple[int, int]:
    if isinstance(size, int) and not isinstance(size, bool):
        size = {"height": size, "width": size}
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        height, width = size["height"], size["width"]
        if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
            return height, width
    raise ValueError(f"the image processor's {name} {size!r} is not supported: height and width, or shortest_edge")


def clip_preprocess(images: Tensor, size: int = 224) -> Tensor:
    """CLIP's preprocessing: shorter side to ``size``, center crop, CLIP's mean and standard deviation.

    Args:
        images: Float [B, 3, H, W] in [0, 1].
        size: Pixels of the model's square input.

    Returns:
        Normalized pixels [B, 3, size, size]; gradients flow.
    """
    return Preprocess.square(size)(images)


def resize(
    images: Tensor, size: tuple[int, int], mode: Literal["bilinear", "bicubic"] = "bicubic", clamp: bool = True
) -> Tensor:
    """Antialiased resize of [B, C, H, W] in [0, 1]; ``clamp`` cuts the bicubic filter's overshoot."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    resized = functional.interpolate(images, size, mode=mode, antialias=True, align_corners=False)
    return resized.clamp(0, 1) if clamp else resized


def center_crop(images: Tensor, size: tuple[int, int], rounding: Literal["floor", "nearest"] = "floor") -> Tensor:
    """Cut [h, w] from the center of [B, C, H, W]; a smaller image is framed with black, as the processors do."""
    pad_h, pad_w = (max(0, want - have) for want, have in zip(size, images.shape[-2:], strict=True))
    if pad_h or pad_w:
        images = functional.pad(images, (pad_w // 2, (pad_w + 1) // 2, pad_h // 2, (pad_h + 1) // 2))
    top, left = (
        gap // 2 if rounding == "floor" else round(gap / 2.0)
        for gap in (have - want for want, have in zip(size, images.shape[-2:], strict=True))
    )
    return images[..., top : top + size[0], left : left + size[1]]


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(images - mean) / std`` per channel."""
    shape = (1, -1, 1, 1)
    mean_t, std_t = (send(torch.tensor(v, dtype=images.dtype), images.device).reshape(shape) for v in (mean, std))
    return (images - mean_t) / std_t
