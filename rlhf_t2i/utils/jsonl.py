"""Read JSON and JSON-lines files that a run leaves; missing or damaged parts are skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils import inputs


def rows(path: Path) -> list[dict[str, Any]]:
    """All lines of a file that are JSON objects with an integer ``step``, in file order.

    A line cut short by a kill is skipped. Returns [] when the file does not exist.
    """
    if not path.is_file():
        return []
    found = []
    for line in path.read_text("utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append(row)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} when the file is missing or damaged."""
    try:
        data = inputs.read_json(path, "JSON file")
    except UsageError:
        return {}
    return data if isinstance(data, dict) else {}
