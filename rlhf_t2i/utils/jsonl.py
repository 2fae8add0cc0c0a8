"""Read the JSON and JSON-lines files that a run leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils import inputs

Row = dict[str, Any]


def lines(path: Path) -> Iterator[tuple[int, Row | None]]:
    """The number of each line and its row; None for a line that is not a JSON object with an integer ``step``.

    Raises:
        UsageError: The file is missing, not a regular file, too large, or unreadable.
    """
    with inputs.open_regular(path, "log", inputs.LOG) as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) and type(row.get("step")) is int else None


def rows(path: Path) -> list[Row]:
    """The rows of a file, in file order; [] when it does not exist.

    A last line without its line feed, which is being written or was cut short by a kill, is left out.

    Raises:
        UsageError: Names another line that is damaged.
    """
    if not path.exists():
        return []
    found = list(lines(path))
    if found and found[-1][1] is None and not path.read_bytes().endswith(b"\n"):
        found.pop()
    damaged = next((number for number, row in found if row is None), None)
    if damaged is not None:
        raise UsageError(f"{path} line {damaged} is damaged: it is no row of this file")
    return [row for _, row in found if row is not None]


def read_json(path: Path) -> Row:
    """A JSON object; {} when the file is missing.

    Raises:
        UsageError: It is damaged.
    """
    if not path.exists():
        return {}
    data = inputs.read_json(path, "JSON file")
    if not isinstance(data, dict):
        raise UsageError(f"{path} is damaged: not a JSON object")
    return data
