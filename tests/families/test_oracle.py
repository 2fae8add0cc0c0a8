"""Every family against diffusers' own pipeline: the rows of ``rlhf-t2i families check`` on tiny random models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_t2i.errors import UsageError
from rlhf_t2i.tools.family_check import check_family
from tests import tiny, tiny_families
from tests.families.test_sampling import store

MODELS: dict[str, Callable[[Path], Path]] = {
    "sdxl": tiny.make_sdxl,
    "sd15": tiny.make_sd15,
    "pixart alpha": tiny_families.make_pixart,
    "pixart sigma": lambda folder: tiny_families.make_pixart(folder, alpha=False),
    "sd3": tiny.make_sd3,
    "sd3 without T5": lambda folder: tiny.make_sd3(folder, t5=False),
    "flux dev": tiny_families.make_flux,
    "flux schnell": lambda folder: tiny_families.make_flux(folder, guidance=False),
    "flux2_klein": tiny_families.make_flux2_klein,
    "z_image": tiny_families.make_z_image,
    "sana": tiny_families.make_sana,
    "sana_sprint": lambda folder: tiny_families.make_sana(folder, sprint=True),
    "qwen_image": tiny_families.make_qwen_image,
}
SIDES = {"sana": 32, "sana_sprint": 32}
"""Pixels of images whose pipeline takes multiples of that alone; the others draw 16 x 16."""


@pytest.mark.parametrize("name", MODELS)
def test_the_family_is_the_pipeline(name: str, tmp_path: Path) -> None:
    side = SIDES.get(name, 16)
    findings = check_family(str(MODELS[name](tmp_path)), torch.device("cpu"), height=side, width=side)
    assert {finding.outcome for finding in findings} == {"pass"}, findings
    assert len(findings) == 11


@pytest.mark.parametrize("name", MODELS)
def test_footprints_take_the_conditioning_of_the_longest_prompt(name: str, tmp_path: Path) -> None:
    """A family states its shapes without encoders; the plan's memory, time and FLOPs rest on them."""
    side = SIDES.get(name, 16)
    models = store(MODELS[name](tmp_path), height=side, width=side)
    encoded = models.conditioner.encode(["dog " * 600]).tensors
    stated = models.family.example_conditioning(1, side, side, torch.float32).tensors
    assert {key: value.shape for key, value in stated.items()} == {key: value.shape for key, value in encoded.items()}


def test_images_need_not_be_square(tmp_path: Path) -> None:
    findings = check_family(str(tiny.make_sd3(tmp_path)), torch.device("cpu"), height=16, width=8)
    assert {finding.outcome for finding in findings} == {"pass"}, findings


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2"])
def test_damaged_weights_are_refused_in_one_sentence(part: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    """They are bad input, not a family that calls its network wrongly."""
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
    file = next((folder / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UsageError, match=str(folder)) as caught:
        check_family(str(folder), torch.device("cpu"), height=16, width=16)
    assert "\n" not in str(caught.value)
