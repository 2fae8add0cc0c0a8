"""Read the evaluations of a run; damaged or missing parts are skipped."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rlhf_t2i.utils.jsonl import read_json


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
