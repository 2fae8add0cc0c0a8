"""A folder's manifest: the size and SHA-256 of every file in it, written last."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlhf_t2i.utils import files

NAME = "manifest.json"


def write(folder: Path, **more: Any) -> None:
    """Write the manifest of what a folder holds now; ``more`` is kept beside it."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor() as pool:  # several at once, for training waits
        digests = list(pool.map(files.sha256, found))
    entries = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(found, digests, strict=True)
    }
    files.write_json(folder / NAME, {**more, "files": entries})


def read(folder: Path) -> dict[str, Any]:
    """What :func:`write` wrote.

    Raises:
        OSError: It is not there.
        ValueError: It is no JSON object.
    """
    found = json.loads((folder / NAME).read_text("utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{folder / NAME} is no JSON object")
    return found


def damage(folder: Path) -> str | None:
    """Which file is missing or has changed, as a phrase; None when all are as they were written."""
    try:
        for name, entry in read(folder)["files"].items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"] or files.sha256(file) != entry["sha256"]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{NAME} cannot be read"
    return None
