"""``models.vae_slicing`` and ``models.vae_tiling``: what they change in the pictures, and what they don't."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.families.test_sampling import store


def test_slicing_decodes_the_same_pictures_and_tiling_nearly(tiny_sdxl: Path) -> None:
    # 32 x 32 latents are larger than a tile (the tiny VAE's sample size is 16 pixels: 8 x 8 latents).
    latents = torch.randn(3, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.13
    with torch.no_grad():
        plain, sliced, tiled = (
            store(tiny_sdxl, **options).decoder.decode(latents)
            for options in ({}, {"vae_slicing": True}, {"vae_tiling": True})
        )
        decoder = store(tiny_sdxl).decoder
        alone = torch.cat([decoder.decode(latents[i : i + 1]) for i in range(3)])
    assert torch.equal(sliced, alone)
    torch.testing.assert_close(sliced, plain, rtol=0, atol=1e-5)  # batched kernels round otherwise
    difference = (tiled - plain).abs()
    assert float(difference.max()) > 1e-4  # attention and group norms see a tile, not the picture
    assert float(difference.mean()) < 0.1
