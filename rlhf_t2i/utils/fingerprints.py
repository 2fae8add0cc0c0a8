"""Digests of files, so that resumed work never mixes two models that stood in the same place."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from rlhf_t2i.utils import files

_BLOCKS, _SIZE = 16, 65536


def of_text(text: str) -> str:
    """A short digest that may stand in a file name."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def of_path(location: str) -> str:
    """A digest of what a local file or folder holds; of the name for a hub id.

    Of large files 16 evenly spaced blocks are read: a training step changes every one of them.

    Raises:
        UsageError: ``~user`` names nobody.
    """
    root = files.expanded(location)
    digest = hashlib.blake2b(digest_size=16)
    if not root.exists():
        digest.update(location.encode())
        return digest.hexdigest()
    for file in sorted(path for path in (root.rglob("*") if root.is_dir() else [root]) if path.is_file()):
        name = file.relative_to(root).as_posix() if root.is_dir() else ""
        digest.update(f"{name} {file.stat().st_size}\n".encode())
        _update(digest, file)
    return digest.hexdigest()


def of_options(options: dict[str, Any]) -> str:
    """A digest of a plugin's options and of the files that they name."""
    parts = []
    for key, value in sorted(options.items()):
        local = isinstance(value, str) and value.startswith((".", "/", "~")) and files.expanded(value).exists()
        parts.append(f"{key}={of_path(value) if local else value!r}")
    return of_text("\n".join(parts))


def _update(digest: Any, file: Path) -> None:
    length = file.stat().st_size
    with file.open("rb") as stream:
        for index in range(_BLOCKS):
            stream.seek(index * max(0, length - _SIZE) // (_BLOCKS - 1))
            digest.update(stream.read(_SIZE))
            if length <= _SIZE:
                return
