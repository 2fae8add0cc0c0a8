"""Printing to a terminal: text of users and of foreign files is shown as it is, without what a terminal would obey."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from rlhf_t2i.errors import printable


class PlainConsole(Console):
    """A console that reads no markup: ``[bold]`` in a label or a path is printed, not obeyed.

    Args:
        stderr: Print there instead of stdout.
        width: In characters; the terminal's when None.
    """

    def __init__(self, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text as rich prints it."""
        return super().render_str(printable(text, keep="\n\t"), **options)
