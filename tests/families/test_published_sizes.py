"""The architectures we build are the published ones: parameter counts on the meta device."""

from __future__ import annotations

import pytest
import torch

from rlhf_t2i.families import adapters
from rlhf_t2i.families import published as published
from rlhf_t2i.families.unet import SDXLFamily
from rlhf_t2i.recipe.schema import Lora


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (published.SDXL_UNET, 2_567_463_684),
        (published.SD15_UNET, 859_520_964),
        (published.VAE, 83_653_863),
        (published.CLIP_L_TEXT, 123_060_480),
        (published.CLIP_BIGG_TEXT, 694_659_840),
        (published.CLIP_H, 986_109_441),
    ],
    ids=["SDXL UNet", "SD1.5 UNet", "VAE", "CLIP-L text", "CLIP-bigG text", "CLIP-H (PickScore)"],
)
def test_parameter_counts(config: dict, count: int) -> None:
    assert published.count_parameters(config) == count


def test_adapters_of_the_full_sdxl_unet() -> None:
    """70 transformer blocks, two attentions each, four layers: the default targets, counted without memory."""
    unet = published.build_on_meta(published.SDXL_UNET)
    names = set(unet.state_dict())
    assert len(names) == 1680
    with torch.device("meta"):
        adapters.add(unet, Lora(rank=64), SDXLFamily.adapter_targets, seed=0)
    trained = [p for p in unet.parameters() if p.requires_grad]
    assert len(trained) == 70 * 2 * 4 * 2
    assert sum(p.numel() for p in trained) == 92_897_280
    assert {name for name, _ in adapters.merged(unet, lambda p: p)} == names


def test_counting_takes_no_memory() -> None:
    assert all(p.is_meta for p in published.build_on_meta(published.VAE).parameters())


def test_foreign_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="FluxTransformer2DModel"):
        published.count_parameters({"_class_name": "FluxTransformer2DModel"})
