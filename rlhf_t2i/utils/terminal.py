"""Printing to a terminal: text of users and of foreign files is shown as it is, without what a terminal would obey."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text


def printable(text: str) -> str:
    """The text with control characters escaped, line feeds and tabs excepted."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class PlainConsole(Console):
    """A console that reads no markup: ``[bold]`` in a label or a path is printed, not obeyed.

    Args:
        stderr: Print there instead of stdout.
    """

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, highlight=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text as rich prints it."""
        return super().render_str(printable(text), **options)
