"""The recipe that these tests change."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.base import BASE


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A file of :data:`BASE`."""
    file = tmp_path / "recipe.yaml"
    file.write_text(BASE, "utf-8")
    return file
