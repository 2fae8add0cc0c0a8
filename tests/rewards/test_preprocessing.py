"""Differentiable preprocessing against the installed library's processor and against PIL's filter without rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rlhf_t2i.plugins.preprocessing import CLIP_STD, Preprocess, clip_preprocess, resize
from tests.rewards.fixtures import formula

SIZES = [(45, 61), (77, 40), (20, 31), (64, 64), (300, 300)]


def as_tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1).float().unsqueeze(0) / 255


def pil_resize_without_rounding(picture: np.ndarray, height: int, width: int) -> Tensor:
    """PIL's own bicubic filter in its 32-bit float mode, one channel at a time."""
    channels = [
        np.asarray(Image.fromarray(picture[..., c].astype(np.float32) / 255).resize((width, height), Image.BICUBIC))
        for c in range(3)
    ]
    return torch.from_numpy(np.stack(channels))


@pytest.mark.parametrize("size", SIZES)
def test_the_resize_is_pils_filter(size: tuple[int, int]) -> None:
    picture = formula.image(*size)
    ours = resize(as_tensor(picture), (32, 48))[0]
    assert (ours - pil_resize_without_rounding(picture, 32, 48).clamp(0, 1)).abs().max() < 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_the_installed_processor_differs_only_by_its_rounding(size: tuple[int, int]) -> None:
    """PIL rounds to uint8 after each of two passes, and bicubic weights of the second add up to 1.25 in magnitude."""
    picture = formula.image(*size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = processor(Image.fromarray(picture), return_tensors="pt").pixel_values[0]
    ours = Preprocess.from_config(processor.to_dict())(as_tensor(picture))[0]
    difference = (ours - expected).abs() * torch.tensor(CLIP_STD).reshape(3, 1, 1)
    assert difference.max() < (0.5 * 1.25 + 0.5) / 255
    assert difference.mean() < 0.5 / 255


def test_the_installed_processor_is_met_exactly_where_nothing_is_resized() -> None:
    picture = formula.image(224, 224)
    expected = CLIPImageProcessorPil()(Image.fromarray(picture), return_tensors="pt").pixel_values
    assert (clip_preprocess(as_tensor(picture)) - expected).abs().max() < 1e-5


def test_gradients_pass_and_agree_with_finite_differences() -> None:
    images = (0.2 + 0.6 * torch.rand(1, 3, 7, 9, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(Preprocess.square(5), (images,))


def test_a_config_is_read_in_both_published_forms() -> None:
    flat = {"size": 336, "crop_size": 336, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    nested = {"image_processor": {"size": {"height": 20, "width": 30}, "do_center_crop": False, "resample": 2}}
    read = Preprocess.from_config(flat)
    assert (read.resize, read.crop, read.mean, read.std) == (336, (336, 336), (0.5,) * 3, (0.25,) * 3)
    assert Preprocess.from_config(nested)(torch.rand(1, 3, 50, 50)).shape == (1, 3, 20, 30)
    with pytest.raises(ValueError, match=r"resample 0 is not supported"):
        Preprocess.from_config({"resample": 0})


def test_padding_frames_the_whole_image_and_cropping_does_not() -> None:
    wide = torch.ones(1, 3, 16, 64)
    black = -torch.tensor(Preprocess().mean) / torch.tensor(CLIP_STD)
    padded = Preprocess.square(32, pad=True)(wide)
    assert padded.shape == (1, 3, 32, 32)
    assert torch.allclose(padded[0, :, 0, 0], black)
    assert not torch.isclose(Preprocess.square(32)(wide)[0, :, 0, 0], black).any()


def exact(image: Tensor, mean: float, std: float) -> Tensor:
    return (image - mean) / std


@pytest.mark.parametrize(
    ("config", "size", "mean", "std"),
    [
        ({"do_normalize": False, "size": 8, "crop_size": 8}, (8, 8), 0.0, 1.0),
        ({"do_resize": False, "do_center_crop": False, "do_normalize": False}, (8, 8), 0.0, 1.0),
        ({"do_resize": False, "crop_size": 4, "do_normalize": False}, (4, 4), 0.0, 1.0),
        # ViT's processor has no crop, stretches to height x width, and normalizes with 0.5.
        ({"image_processor_type": "ViTImageProcessor", "size": 8}, (8, 8), 0.5, 0.5),
        ({"image_processor_type": "ViTImageProcessorFast", "size": {"height": 8, "width": 8}}, (8, 8), 0.5, 0.5),
        # Images are in [0, 1]: a factor of 1/127.5 doubles them, none makes them 0 to 255.
        ({"size": 8, "crop_size": 8, "rescale_factor": 1 / 127.5, "image_mean": [1] * 3, "image_std": [1] * 3},
         (8, 8), 0.5, 0.5),
        ({"size": 8, "crop_size": 8, "do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
         (8, 8), 0.5, 0.5),
    ],
)  # fmt: skip
def test_the_switches_of_a_processor_are_honored(
    config: dict[str, object], size: tuple[int, int], mean: float, std: float
) -> None:
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = Preprocess.from_config(config)(image)
    assert tuple(found.shape[-2:]) == size
    if size == (8, 8):
        torch.testing.assert_close(found, exact(image, mean, std))


def test_a_vit_processor_is_the_installed_one() -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    picture = formula.image(224, 224)
    processor = ViTImageProcessorPil()
    expected = processor(Image.fromarray(picture), return_tensors="pt").pixel_values
    config = processor.to_dict() | {"image_processor_type": "ViTImageProcessor"}
    assert (Preprocess.from_config(config)(as_tensor(picture)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"size": [224, 224]}, r"size \[224, 224\] is not supported"),
        ({"size": {"longest_edge": 224}}, "size .* is not supported"),
        ({"size": 0}, "size .*0.* is not supported"),
        ({"size": True}, "size True"),
        ({"crop_size": {"height": 224}}, "crop_size .* is not supported"),
        ({"do_pad": True}, "do_pad is not supported"),
        ({"image_processor_type": "Mask2FormerImageProcessor"}, "'Mask2FormerImageProcessor' is not supported"),
        ({"image_mean": 0.5}, "image_mean 0.5 is not three numbers"),
        ({"rescale_factor": 0}, "rescale_factor 0 is not positive"),
        ({"image_std": [0.3, 0.0, 0.3]}, r"image_std \[0.3, 0.0, 0.3\] is not positive"),
        ({"image_std": [float("nan")] * 3}, "is not positive"),
        ({"do_normalize": "no"}, "do_normalize 'no' is neither true nor false"),
        ({"do_resize": 0}, "do_resize 0 is neither true nor false"),
    ],
)
def test_what_a_processor_does_beyond_is_refused(config: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Preprocess.from_config(config)
