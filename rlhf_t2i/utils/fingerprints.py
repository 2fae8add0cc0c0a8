"""Digests of what files hold, so that finished work is never mixed with work on other content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils import files


def of_text(text: str) -> str:
    """A short digest, fit for a file name."""
    return of_lines([text])


def of_lines(lines: Iterable[str]) -> str:
    """The digest of the text that the lines make, joined by line feeds."""
    digest = hashlib.sha256()
    for number, line in enumerate(lines):
        digest.update(f"\n{line}".encode() if number else line.encode())
    return digest.hexdigest()[:12]


def of_path(location: str | Path) -> str:
    """A digest of the names and contents in a local file or folder; of the text itself where no such path exists.

    Raises:
        UsageError: A pipe or a device, which may never end; ``~user`` names nobody.
    """
    root = files.expanded(str(location))
    if not root.exists():
        return of_text(str(location))
    if not root.is_dir() and not root.is_file():
        raise UsageError(f"{location} is a pipe or a device: name a file or folder")
    found = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(of_file, found))
    names = [path.relative_to(root).as_posix() for path in found]
    return of_text("\n".join(f"{name} {digest}" for name, digest in zip(names, digests, strict=True)))


def of_file(path: Path) -> str:
    """The SHA-256 of a file's content, kept for this process while its size and times stay."""
    status = path.stat()
    return _digest(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(path: Path, *changes: int) -> str:
    return files.sha256(path)
