"""Digests of files, so that resumed work never mixes two models that stood in the same place."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_t2i.utils import files

_BLOCKS, _SIZE = 16, 65536
_STANDARD = Path(sysconfig.get_path("stdlib"))


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


def of_code(cls: type) -> str:
    """A digest of a class's source: its module, its bases' modules, and modules beside them that they import.

    Libraries are left out: their versions stand for them.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(_sources(cls)):
        digest.update(f"{file.name} {files.sha256(file)}\n".encode())
    return digest.hexdigest()


def _sources(cls: type) -> set[Path]:
    own = cls.__module__.partition(".")[0]
    found: set[Path] = set()
    modules = [base.__module__ for base in cls.__mro__]
    while modules:
        module = sys.modules.get(name := modules.pop())
        file = Path(getattr(module, "__file__", None) or "")
        package = name.partition(".")[0]
        installed = "site-packages" in file.parts or file.is_relative_to(_STANDARD)
        library = package != own and (installed or package == "rlhf_t2i")
        if library or file in found or not file.is_file():
            continue
        found.add(file)
        for other in _imported(file, getattr(module, "__package__", None) or ""):
            beside = getattr(sys.modules.get(other), "__file__", None)
            if beside and Path(beside).parent == file.parent:
                modules.append(other)
    return found


def _imported(file: Path, package: str) -> Iterator[str]:
    """Names that a source file imports; what is no module is no harm."""
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # edited since it was imported
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(name, package) if node.level else name
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


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
