"""The shipped configurations describe the published architectures: parameter counts on the meta device."""

from __future__ import annotations

import pytest
import torch

from rlhf_t2i.families import adapters, registry, sources
from rlhf_t2i.families.base import Family
from rlhf_t2i.recipe.schema import Lora

SDXL, SD15 = "stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-v1-5/stable-diffusion-v1-5"


def family(name: str) -> Family:
    return registry.find(sources.parse(name))


def count(module: torch.nn.Module) -> int:
    assert all(p.is_meta for p in module.parameters())
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "network", "text"), [(SDXL, 2_567_463_684, 123_060_480 + 694_659_840), (SD15, 859_520_964, 123_060_480)]
)
def test_parameter_counts(name: str, network: int, text: int) -> None:
    found = family(name)
    found.check()
    assert count(found.build_network()) == network
    assert count(found.build_text_encoders()) == text
    assert count(found.build_decoder()) == 83_653_863
    assert count(found.build_decoder(sources.parse("madebyollin/sdxl-vae-fp16-fix"))) == 83_653_863


def test_adapters_of_the_full_sdxl_unet() -> None:
    """70 transformer blocks, two attentions each, four layers: the default targets, counted without memory."""
    found = family(SDXL)
    network = found.build_network()
    names = set(network.state_dict())
    assert len(names) == 1680
    with torch.device("meta"):
        adapters.add(network, Lora(rank=64), found.adapter_targets, seed=0)
    trained = [p for p in network.parameters() if p.requires_grad]
    assert len(trained) == 70 * 2 * 4 * 2
    assert sum(p.numel() for p in trained) == 92_897_280
    assert {name for name, _ in adapters.merged(network, lambda p: p)} == names
