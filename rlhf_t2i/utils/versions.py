"""Versions of installed packages, and whether torch and torchvision are of one build."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import Version

from rlhf_t2i.errors import UsageError

_COMPUTING = (
    "rlhf-t2i", "torch", "deepspeed", "ray", "diffusers", "transformers", "peft", "safetensors", "numpy",
    "bitsandbytes", "open_clip_torch",
)  # fmt: skip


def computing() -> dict[str, str]:
    """The versions of Python and of the packages that compute a run."""
    return installed(_COMPUTING)


def installed(packages: Sequence[str]) -> dict[str, str]:
    """The versions of Python and of packages; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def check_torchvision() -> None:
    """Refuse a torchvision that is of another release or build than the installed torch; none is fine.

    transformers and open_clip import torchvision wherever it is installed, and one that does not match ends in
    "operator torchvision::nms does not exist" far from the cause.

    Raises:
        UsageError: They do not match; names both versions and the fix.
    """
    try:
        torch, torchvision = version("torch"), version("torchvision")
    except PackageNotFoundError:
        return
    needed = next((r for r in map(Requirement, requires("torchvision") or ()) if r.name == "torch"), None)
    builds = {local for text in (torch, torchvision) if (local := Version(text).local)}
    if needed is not None and not needed.specifier.contains(torch, prereleases=True):
        problem = f"torchvision {torchvision} is for {needed}, but torch {torch} is installed"
    elif len(builds) > 1:
        problem = f"torchvision {torchvision} and torch {torch} are of different builds"
    else:
        return
    raise UsageError(f"{problem}: pip install 'torch=={torch}' torchvision, with the index that torch came from")
