"""What a run's result depends on besides its recipe: content of files, code of plugins, versions of packages."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rlhf_t2i.plugins import registry
from rlhf_t2i.recipe.schema import Models, PluginChoice, Recipe
from rlhf_t2i.utils import files, fingerprints

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
    yield f"{key} code", fingerprints.of_code(cls)
    yield f"{key} options", fingerprints.of_options(cls.Options(**choice.options).model_dump())


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
