"""A video autoencoder for single frames: two-dimensional convolutions, the images and gradients of the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_t2i.families.one_frame import OneFrameDecoder
from rlhf_t2i.families.recomputing import checkpoint_layers
from tests import tiny_families

LATENTS = (2, 4, 8, 12)


@pytest.fixture(scope="module")
def original() -> Any:
    torch.manual_seed(0)
    return tiny_families.make_qwen_vae().eval().requires_grad_(False)


@pytest.fixture
def decoder(original: Any) -> OneFrameDecoder:
    return OneFrameDecoder(copy.deepcopy(original))


def latents() -> Tensor:
    return torch.randn(LATENTS, generator=torch.Generator().manual_seed(1))


def pipelines_images(vae: Any, z: Tensor) -> Tensor:
    mean, std = (torch.tensor(n).reshape(1, -1, 1, 1, 1) for n in (vae.config.latents_mean, vae.config.latents_std))
    return (vae.decode(z.unsqueeze(2) * std + mean, return_dict=False)[0][:, :, 0] / 2 + 0.5).clamp(0, 1)


def test_no_convolution_is_left_in_three_dimensions(decoder: OneFrameDecoder, original: Any) -> None:
    assert any(isinstance(module, nn.Conv3d) for module in original.modules())
    assert not any(isinstance(module, nn.Conv3d) for module in decoder.modules())
    decoder.to(memory_format=torch.channels_last)  # weights with five axes have no such format


@pytest.mark.parametrize("recomputed", [False, True])
def test_images_and_gradients_are_the_originals(recomputed: bool, decoder: OneFrameDecoder, original: Any) -> None:
    if recomputed:
        checkpoint_layers(decoder)
    found = []
    for decode in (decoder.decode, lambda z: pipelines_images(original, z)):
        z = latents().requires_grad_(True)
        images = decode(z)
        (slope,) = torch.autograd.grad((images * images.detach().roll(1)).sum(), z)
        found.append((images.detach(), slope))
    assert found[0][0].std() > 0.05
    assert found[0][1].abs().max() > 0.01
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_encoding_gives_the_posteriors_mean(decoder: OneFrameDecoder, original: Any) -> None:
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(2))
    theirs = original.encode(images.unsqueeze(2) * 2 - 1).latent_dist.mean[:, :, 0]
    torch.testing.assert_close(decoder.encode(images), theirs, rtol=1e-5, atol=1e-5)


TILES = dict.fromkeys(("tile_sample_min_height", "tile_sample_min_width"), 12) | dict.fromkeys(
    ("tile_sample_stride_height", "tile_sample_stride_width"), 8
)
SAVINGS: dict[str, Callable[[Any], None]] = {
    "slicing": lambda vae: vae.enable_slicing(),
    "tiling": lambda vae: vae.enable_tiling(**TILES),
}


@pytest.mark.parametrize("kind", SAVINGS)
def test_slices_and_tiles_are_the_originals(kind: str, decoder: OneFrameDecoder, original: Any) -> None:
    plain, vae = decoder.decode(latents()), copy.deepcopy(original)
    decoder.limit_memory(kind == "slicing", kind == "tiling")
    for one in (decoder.vae, vae):
        SAVINGS[kind](one)
    images = decoder.decode(latents())
    torch.testing.assert_close(images, pipelines_images(vae, latents()), rtol=0, atol=1e-5)
    changed = float((images - plain).abs().max())
    assert changed > 1e-3 if kind == "tiling" else changed < 1e-5
