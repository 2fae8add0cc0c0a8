"""Files that are whole or absent: written aside, then renamed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_t2i.errors import UsageError

_ASIDE = ".writing-"


def expanded(path: str) -> Path:
    """A path with ``~`` or ``~user`` replaced by the home folder.

    Raises:
        UsageError: There is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"no such file or folder: {path} (no user has that home folder)") from None


def write_text(path: Path, text: str) -> None:
    """Replace a file's content atomically, and wait until it is on the disk."""
    write_atomic(path, text, durable=True)
    sync_folder(path.parent)


def write_atomic(path: Path, data: bytes | str, durable: bool = False) -> Path:
    """Replace a file's content atomically; its folder is made where it is missing.

    Args:
        path: The file.
        data: Its content; text is written as UTF-8.
        durable: Wait for the disk. What can be made again, an evaluation's picture, need not.

    Returns:
        The path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(_ASIDE + path.name)
    with aside.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    return aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` only if the block succeeds; an older ``path`` is replaced."""
    aside = path.with_name(_ASIDE + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            shutil.rmtree(path)
        aside.rename(path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def remove_unfinished(parent: Path) -> None:
    """Remove what :func:`whole_folder` left in ``parent`` when its process was killed."""
    for folder in parent.glob(f"{_ASIDE}*"):
        remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder and all in it, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite(value: Any) -> Any:
    """The same with null for numbers that are not finite: JSON has none."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
