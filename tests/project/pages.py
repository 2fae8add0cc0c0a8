"""Run the code of a page: its Python blocks in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """The line and the text of every block of a language."""
    text = (ROOT / page).read_text("utf-8")
    return [
        (text.count("\n", 0, match.start()) + 2, match[2]) for match in _BLOCK.finditer(text) if match[1] == language
    ]


def run(page: str) -> dict[str, Any]:
    """Run all Python blocks of a page; an error shows the page's line. Returns the namespace."""
    names: dict[str, Any] = {"__name__": page}
    for line, source in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + source, str(ROOT / page), "exec"), names)
    return names
