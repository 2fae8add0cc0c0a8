"""Outside families/ no module of the package knows a model: it names no network class, architecture or tokenizer."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

import rlhf_t2i
from rlhf_t2i.families import registry

PACKAGE = Path(rlhf_t2i.__file__).parent
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file.parent.name != "families")
WORDS = (r"unet", r"\blcm", r"two[ _](text[ _])?encoders", r"is_(sdxl|sd15|flux|sd3)", r"CLIPTokenizer", r"tokenizer_2")
ALLOWED: dict[str, str] = {}
"""Files that may, and whose room they are in."""


@cache
def pattern() -> re.Pattern[str]:
    """The words, the classes of diffusers' networks, and the families' names."""
    from diffusers import models

    classes = {name for names in models._import_structure.values() for name in names if name[0].isupper()}
    assert {"UNet2DConditionModel", "AutoencoderKL", "SD3Transformer2DModel"} <= classes
    installed = list(registry.installed())
    families = {rf"['\"]{row.name}['\"]" for row in installed}
    pipelines = {name for row in installed if row.cls is not None for name in row.cls.pipelines}
    return re.compile("|".join([*WORDS, *(rf"\b{name}\b" for name in classes | pipelines), *families]), re.IGNORECASE)


def found(text: str) -> list[str]:
    lines = enumerate(text.splitlines(), 1)
    return [f"line {number}: {line.strip()}" for number, line in lines if pattern().search(line)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_module_knows_a_model(file: Path) -> None:
    name = str(file.relative_to(PACKAGE))
    if name in ALLOWED:
        assert found(file.read_text("utf-8")), f"{name} is clean: take it off the list"
    else:
        assert not found(file.read_text("utf-8"))


def test_the_scan_sees_what_it_is_for() -> None:
    for line in ("a UNet's blocks", "LCMScheduler", "if is_sdxl:", "cls = FluxTransformer2DModel", 'name == "sdxl"'):
        assert found(line), line
    assert not found("the network's text encoders and its decoder")
