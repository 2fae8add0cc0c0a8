"""What ships beside the code: the recipes, and emoji64, the small models of the quickstart.

In a checkout they are the folders ``recipes/`` and ``zoo/emoji64/``. Installed, the recipes are data of this package,
and emoji64 is the package rlhf-t2i-emoji64, which the extra ``demo`` brings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe import mistakes

WORLD: Final = "emoji64"
_PREFIX: Final = f"{WORLD}:"
_PACKAGE: Final = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """The folder of the shipped recipes."""
    installed = _PACKAGE / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def recipe_names() -> list[str]:
    """The shipped recipes, without their suffix: ``quickstart``, ``sd15/sim``."""
    folder = recipes_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a shipped recipe.

    Args:
        name: With or without ``.yaml``.

    Raises:
        UsageError: There is none; names the nearest.
    """
    names, short = recipe_names(), name.removesuffix(".yaml")
    if short not in names:
        raise UsageError(f"no shipped recipe {mistakes.shown(name)!r}; {mistakes.hint(short, names)}")
    return recipes_folder() / f"{short}.yaml"


def emoji64() -> Path:
    """The folder of the small models, their data and prompts.

    Raises:
        UsageError: They are not installed.
    """
    checkout = _PACKAGE.parent / "zoo" / WORLD
    if (_PACKAGE.parent / "pyproject.toml").is_file() and checkout.is_dir():
        return checkout
    package = find_spec("rlhf_t2i_emoji64")
    if package is None or not package.submodule_search_locations:
        raise UsageError("the small models of emoji64 are not installed: pip install 'rlhf-t2i[demo]'")
    return Path(next(iter(package.submodule_search_locations)))


def resolve(text: str, place: str = "") -> str:
    """``emoji64:reference`` as the path of that file or folder of emoji64; any other text as it is.

    ``emoji64:reader.py:Named`` is a class of a file of it.

    Args:
        text: A model, a prompt file or an option.
        place: Prefix of the error message: ``models.reference: ``.

    Raises:
        UsageError: emoji64 is not installed, or has no such file.
    """
    if not text.startswith(_PREFIX):
        return text
    name, attribute = text.removeprefix(_PREFIX), ""
    if ".py:" in name:
        name, _, attribute = name.rpartition(":")
    try:
        folder = emoji64()
    except UsageError as error:
        raise UsageError(f"{place}{text}: {error}") from None
    inside = name and not Path(name).is_absolute() and ".." not in Path(name).parts
    if not inside or not os.path.exists(folder / name):  # noqa: PTH110 - a name may be too long for the system
        names = _names(folder)
        raise UsageError(f"{place}{mistakes.shown(text)}: {WORLD} has no such file; {mistakes.hint(name, names)}")
    return f"{folder / name}:{attribute}" if attribute else str(folder / name)


def resolve_all(value: object) -> object:
    """The value with :func:`resolve` applied to every text in it."""
    if isinstance(value, dict):
        return {name: resolve_all(item) for name, item in value.items()}
    if isinstance(value, list):
        return [resolve_all(item) for item in value]
    return resolve(value) if isinstance(value, str) else value


def _names(folder: Path) -> Iterator[str]:
    """The models, data and prompt files, for error messages: not the files inside the models, nor those about them."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".py") or (path.is_dir() and not path.suffix):
            yield path.name
        if path.name in ("data", "prompts"):
            yield from (f"{path.name}/{file.name}" for file in sorted(path.iterdir()))
