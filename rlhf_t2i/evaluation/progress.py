"""ProgressCallback of an evaluation, on a terminal."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class ProgressCallback(Protocol):
    """Told about every batch."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` images went through the phase ``what``."""


def bar() -> AbstractContextManager[Any]:
    """A progress bar on a terminal, silence elsewhere; gives a :class:`ProgressCallback` or None."""
    from rlhf_t2i.utils.terminal import PlainConsole

    console = PlainConsole(stderr=True)
    return _Bar(console) if console.is_terminal else nullcontext()


class _Bar:
    def __init__(self, console: Any) -> None:
        from rich import progress as rich_progress

        columns = [
            rich_progress.TextColumn("{task.description}", markup=False), rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(), rich_progress.TimeRemainingColumn(),
        ]  # fmt: skip
        self._bar = rich_progress.Progress(*columns, console=console)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> ProgressCallback:
        self._bar.start()
        return self._show

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def _show(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done)
