"""Run a plugin's code: whatever it raises becomes a sentence with the author's own file and line."""

from __future__ import annotations

import inspect
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.plugins import process_state

_CORE = Path(__file__).resolve().parents[1]
_LIBRARIES = {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")}
_NUMPY = " Use tensor.detach().numpy() instead."  # the wrong advice: it cuts the gradient
_PREPROCESSING = "rlhf_t2i.plugins.preprocessing resizes, crops and normalizes in torch operations"


@contextmanager
def building(what: str, plugin: type | None = None) -> Iterator[None]:
    """Import or build a plugin in this block.

    Args:
        what: Begins the error message: ``reward 'x' cannot be imported``.
        plugin: The class, whose file is named in the message.

    Raises:
        UsageError: The code raised anything but this project's errors, ``SystemExit`` included.
    """
    try:
        with process_state.restored():
            yield
    except (UsageError, RunError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UsageError(f"{what}: {describe(error, plugin)}") from error


def describe(error: BaseException, plugin: type | None = None) -> str:
    """``color.py:12: ValueError: no such file``, on one line, with advice for the usual mistakes."""
    where = author_line(error, plugin)
    if isinstance(error, SystemExit):
        text = f"called sys.exit({error.code!r}); raise an exception instead"
    else:
        said = " ".join(str(error).split()).replace(_NUMPY, "")
        text = f"{type(error).__name__}: {said}".rstrip(": ")
    return f"{f'{where}: ' if where else ''}{text}{advice(error)}"


def author_line(error: BaseException, plugin: type | None = None) -> str:
    """``FILE:LINE`` of the author's code that raised an error; "" if none of it is in the traceback.

    That is the innermost line in the plugin's own file, else the innermost one that is neither this project's nor a
    library's.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = _file(plugin)
    inside = [f for f in frames if own and Path(f.filename).resolve() == own]
    inside = inside or [f for f in frames if not _is_foreign(f.filename)]
    return f"{Path(inside[-1].filename).name}:{inside[-1].lineno}" if inside else ""


def advice(error: BaseException) -> str:
    """What usually mends an error of score(), in parentheses; "" if nothing is known."""
    text = str(error)
    if "detach().numpy()" in text or ("numpy" in text and "grad" in text):
        return f" (a processor, numpy or PIL cuts the gradient: {_PREPROCESSING})"
    if "leaf Variable that requires grad" in text or "modified by an inplace operation" in text:
        return " (score writes into its images: work on a new tensor)"
    if "before Module.__init__() call" in text or "has no attribute '_parameters'" in text:
        return " (call super().__init__(options) first)"
    return ""


def _file(plugin: type | None) -> Path | None:
    try:
        return None if plugin is None else Path(inspect.getfile(plugin)).resolve()
    except (TypeError, OSError):
        return None


def _is_foreign(file: str) -> bool:
    path = Path(file)
    libraries = any(path.is_relative_to(folder) for folder in _LIBRARIES)
    return file.startswith("<") or libraries or "site-packages" in path.parts or path.resolve().is_relative_to(_CORE)
