"""The shipped configurations of published models build networks of the published sizes, on the meta device."""

from __future__ import annotations

import pytest

from rlhf_t2i.families import registry, sources

# Family, billions of parameters of the network, latents at the model's own size, billions of the text encoders.
SIZES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("sd15", 0.860, (4, 64, 64), 0.123),
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", 2.567, (4, 128, 128), 0.818),
    "PixArt-alpha/PixArt-XL-2-1024-MS": ("pixart", 0.611, (4, 128, 128), 4.762),
    "stabilityai/stable-diffusion-3.5-medium": ("sd3", 2.243, (16, 128, 128), 5.581),
    "stabilityai/stable-diffusion-3.5-large": ("sd3", 8.057, (16, 128, 128), 5.581),
    "black-forest-labs/FLUX.1-dev": ("flux", 11.901, (16, 128, 128), 4.885),
    "black-forest-labs/FLUX.2-klein-base-4B": ("flux2_klein", 3.876, (128, 64, 64), 4.022),
    "Tongyi-MAI/Z-Image": ("z_image", 6.155, (16, 128, 128), 4.022),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": ("sana", 1.604, (32, 32, 32), 2.614),
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": ("sana", 1.605, (32, 32, 32), 2.614),
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers": ("sana_sprint", 1.610, (32, 32, 32), 2.614),
    "Qwen/Qwen-Image": ("qwen_image", 20.430, (16, 128, 128), 8.292),
}


@pytest.mark.parametrize("model", SIZES)
def test_sizes_are_the_published_ones(model: str) -> None:
    name, network, latents, encoders = SIZES[model]
    family = registry.find(sources.parse(model))
    family.check()
    family.check_decoder(None)
    assert family.name == name
    assert family.latent_shape(*family.native_size()) == latents
    assert sum(p.numel() for p in family.build_network().parameters()) == pytest.approx(network * 1e9, rel=1e-3)
    assert sum(p.numel() for p in family.build_text_encoders().parameters()) == pytest.approx(encoders * 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("generator", "reference"),
    [
        ("stabilityai/stable-diffusion-3.5-large-turbo", "stabilityai/stable-diffusion-3.5-large"),
        ("black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/FLUX.2-klein-base-4B"),
        ("Tongyi-MAI/Z-Image-Turbo", "Tongyi-MAI/Z-Image"),
        (
            "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
            "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
        ),
    ],
)
def test_distilled_models_have_the_structure_of_their_references(generator: str, reference: str) -> None:
    source = sources.parse(generator)
    registry.find(sources.parse(reference)).for_generator(source).check_structure(source, "models.generator")
