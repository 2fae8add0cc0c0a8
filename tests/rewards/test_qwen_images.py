"""Qwen2-VL's preprocessing against transformers' own processor, and its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from rlhf_t2i_plugins.rewards.qwen_images import QwenPreprocess
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rlhf_t2i.plugins.preprocessing import CLIP_STD
from tests.rewards.fixtures import formula
from tests.rewards.qwen_builders import pictures

PUBLISHED = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
# PIL rounds to uint8 after each of two passes, and bicubic weights of the second add up to 1.25 in magnitude.
ROUNDING = (0.5 * 1.25 + 0.5) / 255


def theirs(height: int, width: int, **settings: int) -> tuple[Tensor, list[int]]:
    """transformers' patches and grid of an 8-bit picture."""
    found = Qwen2VLImageProcessorPil(**settings)([Image.fromarray(formula.image(height, width))], return_tensors="pt")
    return found.pixel_values, found.image_grid_thw[0].tolist()


@pytest.mark.parametrize("size", [(56, 56), (84, 140), (280, 56)])
def test_the_processor_is_met_exactly_where_nothing_is_resized(size: tuple[int, int]) -> None:
    expected, grid = theirs(*size, **PUBLISHED)
    preprocess = QwenPreprocess.from_config(PUBLISHED)
    assert [1, *preprocess.grid(*size)] == grid
    assert (preprocess(pictures(1, *size))[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("size", "pixels"), [((61, 45), (3136, 12845056)), ((200, 333), (28 * 28 * 16,) * 2), ((30, 31), (50176, 50176))]
)
def test_the_processor_differs_only_by_its_rounding(size: tuple[int, int], pixels: tuple[int, int]) -> None:
    settings = PUBLISHED | {"min_pixels": pixels[0], "max_pixels": pixels[1]}
    expected, grid = theirs(*size, **settings)
    preprocess = QwenPreprocess.from_config(settings)
    assert [1, *preprocess.grid(*size)] == grid
    difference = (preprocess(pictures(1, *size))[0] - expected).unflatten(1, (3, -1)).abs()
    difference = difference * torch.tensor(CLIP_STD).reshape(1, 3, 1)
    assert difference.max() < ROUNDING
    assert difference.mean() < 0.5 / 255


def test_gradients_pass_and_agree_with_finite_differences() -> None:
    images = (0.2 + 0.6 * torch.rand(2, 3, 7, 9, dtype=torch.float64)).requires_grad_()
    preprocess = QwenPreprocess(min_pixels=64, max_pixels=64, patch=2)
    assert preprocess.grid(7, 9) != (7 // 2, 9 // 2), "nothing is resized"
    assert torch.autograd.gradcheck(preprocess, (images,))


def test_bfloat16_images_are_not_resized_in_bfloat16() -> None:
    images = pictures(1, 45, 61).bfloat16()
    assert torch.equal(QwenPreprocess()(images), QwenPreprocess()(images.float()))


def test_a_config_is_read_in_all_published_forms() -> None:
    old = QwenPreprocess.from_config(PUBLISHED | {"image_processor_type": "Qwen2VLImageProcessor"})
    size = {"shortest_edge": 3136, "longest_edge": 12845056}
    new = {"size": size, "patch_size": 14, "merge_size": 2, "image_processor_type": "Qwen2VLImageProcessorFast"}
    assert old == QwenPreprocess.from_config({"image_processor": new}) == QwenPreprocess(max_pixels=12845056)
    mean = QwenPreprocess.from_config(PUBLISHED | {"image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    assert (mean.mean, mean.std) == ((0.5,) * 3, (0.25,) * 3)
    assert QwenPreprocess().limited(784).max_pixels == 784
    assert QwenPreprocess().limited(10**9) == QwenPreprocess()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor' is not supported"),
        ({"do_resize": False}, "do_resize False is not supported"),
        ({"resample": 2}, "resample 2 is not supported"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0 is not supported"),
        ({"patch_size": "x"}, "patch_size 'x' is not a positive integer"),
        ({"min_pixels": -1}, "min_pixels -1 is not a positive integer"),
        ({"image_mean": 0.5}, "image_mean 0.5 is not three numbers"),
    ],
)
def test_what_a_processor_does_beyond_is_refused(config: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        QwenPreprocess.from_config(config)


def test_a_strip_is_refused() -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        QwenPreprocess().grid(10, 2001)
