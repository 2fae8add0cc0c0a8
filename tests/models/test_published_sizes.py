"""The architectures we build are the published ones: parameter counts on the meta device."""

from __future__ import annotations

import pytest

from rlhf_t2i.models import architectures as published


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


def test_counting_takes_no_memory() -> None:
    assert all(p.is_meta for p in published.build_on_meta(published.VAE).parameters())


def test_foreign_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="FluxTransformer2DModel"):
        published.count_parameters({"_class_name": "FluxTransformer2DModel"})
