"""The shipped recipes: what they are, and copies that run where they land."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_t2i.algorithm import prompts
from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe import kinds, reading, shipped
from rlhf_t2i.utils import files, targets
from rlhf_t2i.utils.inputs import JsonObject


@dataclass(frozen=True)
class ShippedRecipe:
    """A row of ``rlhf-t2i recipes``.

    Attributes:
        name: For ``recipes show`` and ``recipes copy``.
        summary: The first line of its header.
    """

    name: str
    summary: str


def shipped_recipes() -> list[ShippedRecipe]:
    """Every shipped recipe, by name."""
    rows = []
    for name in shipped.recipe_names():
        path = shipped.recipe_path(name)
        header = path.read_text("utf-8").partition("\n")[0].removeprefix("#").strip()
        rows.append(ShippedRecipe(name, header))
    return rows


def copy_recipe(name: str, destination: Path) -> tuple[str, list[Path], list[str]]:
    """Copy a shipped recipe, the prompt files that ship beside it, and the recipe that an ablation is based on.

    Args:
        name: The recipe.
        destination: A file that does not exist yet, or a folder.

    Returns:
        The command that takes the copy; the files that were written, the copy first; and what the user must bring
        before it runs, in sentences.

    Raises:
        UsageError: No such recipe, or a file is in the way.
    """
    path = shipped.recipe_path(name)
    target = destination / path.name if destination.is_dir() else destination
    data, _ = reading.read(path)
    text, copies = path.read_text("utf-8"), list[tuple[Path, str]]()
    base = data.get("base") if kinds.command_of(data) == "ablate" else None
    if isinstance(base, str):
        # The copy of the base lies beside the copy, wherever it was beside the original.
        text = re.sub(rf"^base: {re.escape(base)}", f"base: ./{Path(base).name}", text, count=1, flags=re.MULTILINE)
        copies.append((target.parent / Path(base).name, (path.parent / base).read_text("utf-8")))
    copies.insert(0, (target, text))
    beside = [file for file in _prompt_files(data) if (path.parent / file).is_file()]
    copies += [(target.parent / file, (path.parent / file).read_text("utf-8")) for file in beside]
    for file, content in copies:
        if os.path.lexists(file) and not (file.is_file() and file.read_bytes() == content.encode()):
            raise UsageError(f"{file} exists and is another file: give another DEST")
    for file, _ in copies:
        targets.check_file(file, "DEST")
    written = _write_all(copies)
    runs = written[1:2] if base else written[:1]
    return str(kinds.command_of(data)), written, [item for file in runs for item in _missing(file)]


def _write_all(copies: Sequence[tuple[Path, str]]) -> list[Path]:
    """Write files, all of them or none; those that are there already are the same."""
    new = [file for file, _ in copies if not file.exists()]
    try:
        with files.disk_errors(copies[0][0]):
            return [files.write_atomic(file, content) for file, content in copies]
    except BaseException:
        for file in new:
            file.unlink(missing_ok=True)
        raise


def _prompt_files(data: JsonObject) -> Iterator[str]:
    """The prompt files that a recipe names in its own folder."""
    section = data.get("data")
    for name in section.values() if isinstance(section, dict) else ():
        if isinstance(name, str) and re.fullmatch(r"\./[\w.-]+", name):
            yield name


def _missing(path: Path) -> Iterator[str]:
    """What keeps a copied recipe from running: prompt files that are not there, or the small models."""
    data, _ = reading.read(path)
    if kinds.command_of(data) != "run":
        return
    try:
        recipe = reading.load(path)
    except UsageError as error:
        yield str(error)
        return
    for key in ("prompts", "held_out"):
        file = getattr(recipe.data, key)
        if file is not None and not prompts.exists(file):
            yield f"data.{key} names {file}, which does not exist yet"
