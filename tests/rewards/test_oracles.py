"""Each adapter against the code it replaces: values and pixel gradients exported from the original packages.

How the fixtures were made is in fixtures/README.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rlhf_t2i_plugins.rewards.image_reward import MEAN, STD
from torch import Tensor

from rlhf_t2i.plugins import registry
from rlhf_t2i.plugins.base import Reward
from rlhf_t2i.plugins.preprocessing import CLIP_STD, Preprocess
from rlhf_t2i.roles.reward import freeze
from tests.rewards import builders
from tests.rewards.fixtures import formula

TOLERANCE = 1e-4
# PIL rounds to uint8 after each of two passes, and bicubic weights of the second add up to 1.25 in magnitude.
ROUNDING = (0.5 * 1.25 + 0.5) / 255


def value_and_pixel_gradient(reward: Reward) -> tuple[Tensor, Tensor]:
    """Scores of the oracle's pictures and the gradient at the normalized pixels, as the oracles export it."""
    freeze(reward, torch.device("cpu"), torch.float32)
    images = formula.pixels(len(formula.PROMPTS), 32).requires_grad_()
    scores = reward.score(images, formula.PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    return scores.detach(), gradient * torch.tensor(CLIP_STD).reshape(1, 3, 1, 1)


def assert_agrees(reward: Reward, fixture: dict[str, Tensor]) -> None:
    scores, gradient = value_and_pixel_gradient(reward)
    assert (scores - fixture["scores"]).abs().max() < TOLERANCE
    assert fixture["pixel_gradient"].abs().max() > 100 * TOLERANCE, "a fixture without a gradient proves nothing"
    assert (gradient - fixture["pixel_gradient"]).abs().max() < TOLERANCE


def as_tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1).float().unsqueeze(0) / 255


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory: pytest.TempPathFactory) -> Reward:
    folder = builders.write_image_reward(tmp_path_factory.mktemp("image_reward"))
    return freeze(registry.reward("image_reward", model=str(folder)), torch.device("cpu"), torch.float32)


def test_image_reward_gives_the_original_scores_and_gradients(image_reward: Reward) -> None:
    assert_agrees(image_reward, builders.fixture_tensors("image_reward"))


def test_image_reward_reads_prompts_as_the_original(image_reward: Reward) -> None:
    ids = image_reward.encode_text(formula.PROMPTS)[:, 0]
    assert torch.equal(ids, builders.fixture_tensors("image_reward")["input_ids"])


def test_image_reward_preprocesses_pil_images_as_the_original(image_reward: Reward) -> None:
    """The original rounds to uint8 after each resizing pass: at most ROUNDING away, far less on average."""
    fixture = builders.fixture_tensors("image_reward")
    preprocess = image_reward.preprocess
    for index, (height, width) in enumerate([(32, 32), (61, 45), (40, 77)]):
        ours = preprocess(as_tensor(formula.image(height, width, index)))[0]
        difference = (ours - fixture["pil_pixels"][index]).abs() * torch.tensor(CLIP_STD).reshape(3, 1, 1)
        assert difference.max() < ROUNDING
        assert difference.mean() < 0.5 / 255
    exact = image_reward.score(as_tensor(formula.image(32, 32, 0)), formula.PROMPTS[:1])
    assert abs(float(exact) - float(fixture["pil_scores"][0])) < TOLERANCE


def test_image_reward_standardizes_with_the_published_constants() -> None:
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)


def test_hpsv2_gives_the_original_scores_and_gradients(tmp_path: Path) -> None:
    reward = registry.reward("hpsv2", model=str(builders.write_hpsv2(tmp_path)))
    fixture = builders.fixture_tensors("hpsv2")
    assert_agrees(reward, fixture)
    for index, (height, width) in enumerate([(45, 61), (77, 40), (20, 31)]):
        image = as_tensor(formula.image(height, width))
        pixels = reward.clip.preprocess(image)[0]
        assert (pixels - fixture[f"transform_{height}x{width}"]).abs().max() < 1e-3
        score = reward.score(image, [formula.PROMPTS[index]])
        assert (score - fixture[f"score_{height}x{width}"]).abs().max() < TOLERANCE


def test_aesthetic_gives_the_original_scores_and_gradients(tmp_path: Path) -> None:
    clip, head = builders.write_aesthetic(tmp_path)
    reward = registry.reward("aesthetic", model=str(clip), head=str(head))
    fixture = builders.fixture_tensors("aesthetic")
    assert_agrees(reward, fixture)
    score = reward.score(as_tensor(formula.image(32, 32, 0)), ["anything"])
    assert abs(float(score) - float(fixture["pil_scores"][0])) < TOLERANCE


def test_an_open_clip_checkpoint_gives_open_clips_features(tmp_path: Path) -> None:
    shapes = builders.fixture_json("open_clip")["shapes"]
    checkpoint = builders.write_open_clip_state(tmp_path / "open_clip_pytorch_model.bin", shapes, wrap=False)
    builders.clip_tokenizer().save_pretrained(tmp_path)
    reward = registry.reward("clip", open_clip="ViT-small", pretrained=str(checkpoint), tokenizer=str(tmp_path))
    fixture = builders.fixture_tensors("open_clip")
    assert_agrees(reward, fixture)
    with torch.no_grad():
        text = reward.encode_text(formula.PROMPTS)
        image = reward.clip.image_features(formula.pixels(3, 32))
    assert (text - fixture["text_features"]).abs().max() < 1e-5
    assert (image - fixture["image_features"]).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(45, 61), (77, 40), (20, 31)])
def test_preprocessing_stays_within_1e_3_of_torchvisions_processor(size: tuple[int, int]) -> None:
    """transformers' torchvision processor on floats: the same steps without PIL's rounding to uint8.

    Exported from transformers 4.55, which rounds half a pixel as torchvision; 5 rounds down (test_preprocessing).
    """
    expected = builders.fixture_tensors("open_clip")[f"processor_{size[0]}x{size[1]}"]
    ours = Preprocess.square(32, crop_rounding="nearest")(as_tensor(formula.image(*size)))[0]
    assert (ours - expected).abs().max() < 1e-3


@pytest.mark.parametrize("size", [(45, 61), (77, 40), (20, 31)])
def test_preprocessing_stays_within_the_rounding_of_open_clips_transform(size: tuple[int, int]) -> None:
    expected = builders.fixture_tensors("open_clip")[f"transform_{size[0]}x{size[1]}"]
    ours = Preprocess.square(32, crop_rounding="nearest")(as_tensor(formula.image(*size)))[0]
    assert ((ours - expected).abs() * torch.tensor(CLIP_STD).reshape(3, 1, 1)).max() < ROUNDING
