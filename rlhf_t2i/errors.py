"""Errors with a message for the user; the CLI maps them to exit codes. And other libraries' errors in one line."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

Front = Literal["command", "python", "table"]
_front: ContextVar[Front] = ContextVar("where the user gives options", default="command")
_OTHER_NAMES: dict[Front, dict[str, str]] = {
    "command": {},
    "python": {"resume": "resume=True", "allow-recipe-change": "allow_recipe_change=True", "set": "options",
               "timesteps": "student={'timesteps': [...]}"},
    "table": {"out": "--out", "limit": "--limit", "set": "options", "timesteps": "student.timesteps"},
}  # fmt: skip
"""Options whose argument in Python, or key in a table's file, is not their name with underscores for dashes."""


def option(name: str) -> str:
    """How the user gives an option, for error messages: ``--out``, in Python ``out``, in a table's file by its key."""
    front = _front.get()
    return f"--{name}" if front == "command" else _OTHER_NAMES[front].get(name, name.replace("-", "_"))


@contextmanager
def given_in(front: Front) -> Iterator[None]:
    """Let :func:`option` name in this block what the user gives there."""
    token = _front.set(front)
    try:
        yield
    finally:
        _front.reset(token)


class UsageError(Exception):
    """The user's input is wrong (recipe, option, file): one sentence naming the place and the fix; exit code 2."""


class RunError(Exception):
    """The run failed while running: one sentence; exit code 1."""


class ProcessLost(RunError):
    """A process that holds training state died: the run can go on from its newest checkpoint."""


class Stopped(Exception):
    """A signal ended the run; what it had done stays; exit code 128 + signal.

    Args:
        number: The signal.
        saved: The checkpoint written because of it.
        begun: Whether there is a run to resume.
        repeated: A second signal came: exit without waiting for anything.
    """

    def __init__(self, number: int, saved: Path | None = None, begun: bool = True, repeated: bool = False) -> None:
        checkpoint = f"; checkpoint {saved}" if saved else ""
        advice = f"continue with {option('resume')}" if begun else "nothing was written"
        super().__init__(f"stopped by {signal.Signals(number).name}{checkpoint}; {advice}")
        self.exit_code = 128 + number
        self.repeated = repeated


def exit_in_plugin(error: BaseException) -> RunError:
    """The error for code that tried to end the process: ``sys.exit``, or an exception that is not an Exception."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "a plugin"
    what = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {type(error).__name__}"
    return RunError(f"{place} {what} during the run; raise an Exception instead")


def printable(text: str, keep: str = "") -> str:
    """The text with control characters escaped, so that a terminal obeys none; those in ``keep`` stay."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """The first line of a library's error that says something, else its kind: one sentence for the user."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
