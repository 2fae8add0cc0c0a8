"""What a run's result depends on besides its recipe: content of files, code of plugins, versions of packages."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf_t2i.plugins import registry
from rlhf_t2i.recipe.schema import Models, PluginChoice, Recipe
from rlhf_t2i.utils import files, fingerprints

_STANDARD = Path(sysconfig.get_path("stdlib"))
_PACKAGES = (
    "rlhf-t2i", "torch", "deepspeed", "ray", "diffusers", "transformers", "peft", "safetensors", "bitsandbytes",
    "open_clip_torch",
)  # fmt: skip


def content(recipe: Recipe) -> dict[str, str]:
    """Digests by the recipe's key: prompt files, local models, plugins' code and the files that their options name.

    Models on the hub are pinned by ``revisions`` instead.
    """
    return dict(_content(recipe))


def _content(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for key, path in (("data.prompts", recipe.data.prompts), ("data.held_out", recipe.data.held_out)):
        if path:
            yield key, files.sha256(files.expanded(path))
    for key in Models.model_fields:
        value = getattr(recipe.models, key)
        if isinstance(value, str) and files.expanded(value).exists():
            yield f"models.{key}", fingerprints.of_path(value)
    algorithm = recipe.algorithm
    yield from _plugin("algorithm.divergence", registry.DIVERGENCES, algorithm.divergence)
    for key, choices in (("rewards", algorithm.rewards), ("eval_rewards", algorithm.eval_rewards)):
        for choice in choices:
            yield from _plugin(f"algorithm.{key}.{choice.key}", registry.REWARDS, choice)


def _plugin(key: str, group: str, choice: PluginChoice) -> Iterator[tuple[str, str]]:
    cls = registry.load_class(group, choice.name)
    yield f"{key} code", _of_code(cls)
    yield f"{key} options", _of_options(cls.Options(**choice.options).model_dump())


def _of_code(cls: type) -> str:
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


def _of_options(options: dict[str, Any]) -> str:
    """A digest of a plugin's options and of the files that they name."""
    parts = []
    for key, value in sorted(options.items()):
        local = isinstance(value, str) and value.startswith((".", "/", "~")) and files.expanded(value).exists()
        parts.append(f"{key}={fingerprints.of_path(value) if local else value!r}")
    return fingerprints.of_text("\n".join(parts))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str:
    """The commit of the checkout that runs; "" outside one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def device() -> str:
    """The devices of this machine, for a person."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {os.cpu_count()} cores"
