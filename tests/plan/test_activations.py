"""Saved activations: the count on the meta device is what a real forward keeps."""

from __future__ import annotations

import copy

import pytest
import torch

from rlhf_t2i import activations
from rlhf_t2i.models import architectures
from rlhf_t2i.models.frozen import freeze
from tests import tiny


@pytest.mark.parametrize("train", [True, False])
def test_the_meta_count_is_what_a_real_forward_keeps(train: bool) -> None:
    network = tiny.sdxl_unet() if train else freeze(tiny.sdxl_unet())
    x = torch.randn(1, *tiny.LATENTS, requires_grad=not train)
    cond = {"text_embeds": torch.randn(1, tiny.WIDTH), "time_ids": torch.zeros(1, 6)}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), activations.flash_attention():
        network(x, torch.tensor([399]), torch.randn(1, 77, 2 * tiny.WIDTH), added_cond_kwargs=cond)
    real = sum(storage.nbytes() for storage in kept.values())
    counted = activations.unet(
        {**network.config, "_class_name": "UNet2DConditionModel"}, tiny.LATENTS[1], torch.float32, train
    )
    assert counted.plain == pytest.approx(real, rel=0.05)
    assert counted.checkpointed < counted.plain


def test_frozen_networks_keep_less_and_bf16_half() -> None:
    config = {**tiny.sdxl_unet().config, "_class_name": "UNet2DConditionModel"}
    full = activations.unet(config, 8, torch.float32, train=True)
    assert activations.unet(config, 8, torch.float32, train=False).plain < full.plain
    half = activations.unet(config, 8, torch.bfloat16, train=True)
    assert half.plain == pytest.approx(full.plain / 2, rel=0.05)
    larger = activations.unet(config, 16, torch.float32, train=True)
    assert larger.plain == pytest.approx(4 * full.plain, rel=0.15), "about proportional to the pixels"


@pytest.mark.parametrize(
    ("family", "config"),
    [
        pytest.param("sdxl", architectures.SDXL_UNET, marks=pytest.mark.slow),
        ("sd15", architectures.SD15_UNET),
    ],
)
@pytest.mark.parametrize("kind", ["train", "frozen"])
def test_kept_counts_are_current(family: str, config: dict, kind: str) -> None:
    """Within two per cent: other releases of diffusers may save a little more or less."""
    fresh = activations.unet(config, config["sample_size"], torch.bfloat16, kind == "train")
    kept = activations.KEPT[family, kind]
    assert fresh.plain == pytest.approx(kept.plain, rel=0.02)
    assert fresh.checkpointed == pytest.approx(kept.checkpointed, rel=0.02)
    found = activations.of_recipe(copy.deepcopy(config), None, config["sample_size"] // 2, "fp32")[kind]
    assert found.plain == pytest.approx(kept.plain / 4 * 2, rel=1e-6)
