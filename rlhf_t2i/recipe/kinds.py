"""Which command a recipe's file is for: a training run, an ablation, or a table of models."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils.inputs import JsonObject

Command = Literal["run", "ablate", "eval"]
_NAMES: Final[dict[Command, str]] = {
    "run": "the recipe of one run", "ablate": "an ablation of several runs", "eval": "a table of several models",
}  # fmt: skip


def command_of(data: JsonObject) -> Command | None:
    """The command that takes a file's keys; None where they say nothing."""
    if "rows" in data:
        return "ablate" if "base" in data else "eval"
    return "run" if {"models", "algorithm", "steps", "data"} & data.keys() else None


def check(data: JsonObject, path: Path, command: Command) -> None:
    """Refuse a file that another command takes.

    Raises:
        UsageError: Names that command.
    """
    found = command_of(data)
    if found is not None and found != command:
        raise UsageError(f"{path} is {_NAMES[found]}: give it to `rlhf-t2i {found}`")
