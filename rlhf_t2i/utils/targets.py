"""Where a command will write: tried before anything is computed for it, so that an impossible place costs nothing."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils import files


def check_file(path: Path, place: str) -> None:
    """Refuse a file that cannot be written; nothing is left behind.

    Args:
        path: The file; its folder must exist.
        place: Begins the error message: ``-o``.

    Raises:
        UsageError: It is a folder, its folder does not exist, or nothing can be written there.
        RunError: The disk is full or fails.
    """
    if path.is_dir():
        raise UsageError(f"{place} {path} is a folder: name a file")
    if not path.parent.exists():
        raise UsageError(f"{place} {path}: the folder {path.parent} does not exist")
    if not path.parent.is_dir():
        raise UsageError(f"{place} {path}: {path.parent} is a file, not a folder")
    _try_writing(path.parent, path, place)


def check_folder(path: Path, place: str) -> None:
    """Refuse a folder that cannot be made or written into; nothing is left behind.

    Args:
        path: The folder; it need not exist.
        place: Begins the error message: ``--out``.

    Raises:
        UsageError: As of :func:`nearest_folder`, or nothing can be written there.
        RunError: The disk is full or fails.
    """
    _try_writing(nearest_folder(path, place), path, place)


def nearest_folder(path: Path, place: str) -> Path:
    """A folder, or the nearest one above it that exists; arguments as of :func:`check_folder`.

    Raises:
        UsageError: It is a file, or below one, or behind a link to nothing.
    """
    for found in (path, *path.absolute().parents):
        if found.is_symlink() and not found.exists():
            raise UsageError(f"{place} {found} is a link to {found.readlink()}, which does not exist")
        if found.is_dir():
            return found
        if found.exists():
            raise UsageError(f"{place} {found} is a file: name a folder")
    raise UsageError(f"{place} {path} has no folder above it that exists")


def _try_writing(folder: Path, path: Path, place: str) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=files.ASIDE):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise files.not_written(path, error.strerror) from None
        raise UsageError(f"{place} {path} cannot be written: {os.strerror(error.errno or 0)}") from None
