"""docs/recipes.md says what the schema says."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_page_is_current() -> None:
    module = runpy.run_path(str(ROOT / "docs/make_recipes.py"))
    assert (ROOT / "docs/recipes.md").read_text("utf-8") == module["page"](), "run: python docs/make_recipes.py"
