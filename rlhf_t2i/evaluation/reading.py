"""Read what a run left: metrics, evaluations, recipe and provenance; damaged or missing parts are skipped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Evaluated:
    """One scored set of images: ``OUT/evaluation/before.json`` or ``after.json``."""

    step: int
    prompts: list[str]
    scores: dict[str, list[float]]
    kinds: dict[str, str] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    diversity: dict[str, list[float]] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    higher_is_better: dict[str, bool] = field(default_factory=dict)


def evaluated(path: Path) -> Evaluated | None:
    """Read one evaluation; None when it is not there or not readable."""
    data = read_json(path)
    if not data or not isinstance(data.get("prompts"), list) or not isinstance(data.get("scores"), dict):
        return None
    prompts = [str(prompt) for prompt in data["prompts"]]
    # null stands for a score that is not a number.
    scores = {
        key: [float("nan") if v is None else float(v) for v in values]
        for key, values in data["scores"].items()
        if len(values) == len(prompts)
    }
    optional = {name: data.get(name) or {} for name in ("kinds", "units", "diversity", "higher_is_better")}
    return Evaluated(int(data.get("step", 0)), prompts, scores, images=data.get("images") or [], **optional)


def metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order of step; a step repeated after a resume counts once, the last time.

    A line cut short by a kill is skipped.
    """
    rows = {row["step"]: row for row in events(path)}
    return [rows[step] for step in sorted(rows)]


def events(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of steps as they stand; one cut short by a kill is skipped."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append(row)
    return found


def flat(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Nested objects as slash-separated keys: ``{"timing": {"step": 1}}`` becomes ``{"timing/step": 1}``."""
    return [_flatten(row, "") for row in rows]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} when it is missing or damaged."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _flatten(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out |= _flatten(value, f"{prefix}{key}/")
        else:
            out[prefix + key] = value
    return out
