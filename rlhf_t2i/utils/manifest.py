"""A folder's manifest: the size and SHA-256 of every file in it, and of the manifest itself; written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, TypeAdapter

from rlhf_t2i.utils import files, inputs
from rlhf_t2i.utils.inputs import Json, JsonObject

NAME = "manifest.json"
_DIGEST = "sha256"


class _Entry(BaseModel):
    bytes: int
    sha256: str


def write(folder: Path, **more: object) -> None:
    """Write the manifest of a folder's present content; ``more`` is stored beside it."""
    found = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / NAME)
    with ThreadPoolExecutor() as pool:  # several at once, because training waits
        digests = list(pool.map(files.sha256, found))
    entries = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(found, digests, strict=True)
    }
    files.write_text(folder / NAME, render({**more, "files": entries}))


def render(content: Mapping[str, object]) -> str:
    """The text of a manifest: its content and the digest of that."""
    digest = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
    return json.dumps({**content, _DIGEST: digest}, ensure_ascii=False, indent=1) + "\n"


def read(folder: Path) -> JsonObject:
    """The content that :func:`write` stored.

    Raises:
        OSError: The file is missing.
        ValueError: It is not byte for byte what was written.
    """
    if (folder / NAME).stat().st_size > inputs.CONFIG:
        raise ValueError(f"{folder / NAME} is too large to be a manifest")
    text = (folder / NAME).read_bytes().decode()
    found: Json = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"{folder / NAME} is not a JSON object")
    content = {key: value for key, value in found.items() if key != _DIGEST}
    if render(content) != text:
        raise ValueError(f"{folder / NAME} has changed")
    return content


def covered(folder: Path) -> set[Path]:
    """The files that a folder's manifest names, and the manifest; errors as :func:`read`."""
    listed = read(folder).get("files")
    return {folder / NAME, *(folder / name for name in (listed if isinstance(listed, dict) else ()))}


def damage(folder: Path, digest: Callable[[Path], str] = files.sha256) -> str | None:
    """Which file is missing or has changed, as a phrase; None when all are as written."""
    if not (folder / NAME).is_file():
        return f"{NAME} is missing"
    try:
        entries = TypeAdapter(dict[str, _Entry]).validate_python(read(folder).get("files"))
    except (OSError, ValueError, RecursionError):
        return f"{NAME} has changed"
    found = [(name, folder / name, entry) for name, entry in entries.items()]
    for name, file, entry in found:  # what costs nothing first
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry.bytes:
            return f"{name} has changed"
    with ThreadPoolExecutor() as pool:  # several at once, because the user waits
        digests = pool.map(digest, [file for _, file, _ in found])
        changed = [name for (name, _, entry), now in zip(found, digests, strict=True) if now != entry.sha256]
    return f"{changed[0]} has changed" if changed else None
