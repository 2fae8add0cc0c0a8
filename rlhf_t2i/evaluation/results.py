"""Numbers to tables: means over prompts with 95% bootstrap intervals, as JSON, Markdown and CSV."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_t2i import __version__
from rlhf_t2i.evaluation import journal
from rlhf_t2i.evaluation.benchmarks import PromptList
from rlhf_t2i.evaluation.features import Probe
from rlhf_t2i.evaluation.sampler import Sampling
from rlhf_t2i.evaluation.settings import Settings
from rlhf_t2i.utils import files, stats
from rlhf_t2i.utils.numbers import DASH


@dataclass(frozen=True)
class Measured:
    """One metric: its value for each prompt (the units of the interval), and for each image where there is one."""

    key: str
    unit: str
    by_prompt: list[float]
    by_image: list[float] | None = None
    value: float = math.nan
    higher_is_better: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_images(cls, key: str, unit: str, values: list[float], per_prompt: int, higher_is_better: bool) -> Measured:
        """A score of single images, ``per_prompt`` in a row for each prompt."""
        units = np.asarray(values, dtype=np.float64).reshape(-1, per_prompt).mean(1).tolist()
        return cls(key, unit, units, values, stats.mean(units).value, higher_is_better)

    @classmethod
    def of_prompts(cls, key: str, unit: str, values: list[float]) -> Measured:
        """A value for each prompt's set of images."""
        return cls(key, unit, values, None, stats.mean(values).value)

    @classmethod
    def single(cls, key: str, unit: str, value: float, higher_is_better: bool = True) -> Measured:
        """One number for all images, without an interval (a Frechet distance is biased under resampling)."""
        return cls(key, unit, [], None, value, higher_is_better)


@dataclass(frozen=True)
class Results:
    """What an evaluation found."""

    path: Path
    rows: list[dict[str, Any]]
    markdown: str


def class_entropy(probe: Probe, features: np.ndarray, per_prompt: int, name: str) -> list[Measured]:
    """Entropy of the classes among a prompt's images, and the share of each class over all images."""
    probabilities = probe.probabilities(features)
    within = probabilities.reshape(-1, per_prompt, len(probe.labels)).mean(1)
    unit = f"nats within a prompt, at most ln {len(probe.labels)} = {math.log(len(probe.labels)):.3f}, {name}"
    shares = dict(zip(probe.labels, probabilities.mean(0).tolist(), strict=True))
    values = [stats.entropy(row) for row in within]
    whole = Measured.single("class_entropy_overall", unit.replace("within a prompt", "over all images"),
                            stats.entropy(probabilities.mean(0)))  # fmt: skip
    return [
        Measured("class_entropy", unit, values, None, stats.mean(values).value, extra={"shares": shares}),
        whole,
    ]


def write(
    out: Path, settings: Settings, sampling: Sampling, prompts: PromptList, measured: Sequence[Measured]
) -> Results:
    """Write ``results.json``, ``table.md`` and ``table.csv``; nothing in them depends on time, path or resumes."""
    rows = [_row(metric, metric.by_prompt, "") for metric in measured]
    groups = list(dict.fromkeys(group for group in prompts.groups if group))
    for group in groups:
        chosen = [index for index, name in enumerate(prompts.groups) if name == group]
        rows += [_row(m, [m.by_prompt[i] for i in chosen], group) for m in measured if m.by_prompt]
    count = len(prompts.prompts) * settings.images_per_prompt
    heading = (
        f"{count} images of {len(prompts.prompts)} prompts, seed {settings.seed}, {sampling.words}. "
        "Intervals: 95% percentile bootstrap over prompts."
    )
    markdown = f"{heading}\n\n{table(rows)}"
    data = {
        "version": __version__,
        "sampling": {
            "timestep": sampling.timestep, "steps": sampling.steps, "guidance": sampling.guidance,
            "resolution": sampling.resolution, "precision": settings.precision, "seed": settings.seed,
        },
        "prompts": {
            "count": len(prompts.prompts), "images_per_prompt": settings.images_per_prompt,
            "sha256": hashlib.sha256("\n".join(prompts.prompts).encode()).hexdigest(),
        },
        "table": rows,
        "metrics": {m.key: {"unit": m.unit, "by_prompt": m.by_prompt, "by_image": m.by_image} | m.extra
                    for m in measured},
        "images": [{"file": f"images/{i:05d}.png", "prompt": prompts.prompts[i // settings.images_per_prompt]}
                   for i in range(count)],
    }  # fmt: skip
    files.write_atomic(out / "table.md", markdown)
    files.write_atomic(out / "table.csv", _csv(rows))
    return Results(files.write_atomic(out / "results.json", journal.dumps(data)), rows, markdown)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table; the group column only where there are groups."""
    grouped = any(row["group"] for row in rows)
    head = ["metric", *(["group"] if grouped else []), "mean", "95% interval", "prompts", "unit"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        interval = DASH if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}"
        mean = "not a number" if row["mean"] is None else f"{row['mean']:.4f}"
        cells = [
            row["metric"],
            *([row["group"] or "all"] if grouped else []),
            mean,
            interval,
            str(row["prompts"] or "all"),
        ]
        lines.append(" | ".join([*cells, row["unit"].replace("|", "/")]))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _row(metric: Measured, units: Sequence[float], group: str) -> dict[str, Any]:
    value = stats.mean(units).value if units else metric.value
    low, high = stats.bootstrap_interval(units) if units else (math.nan, math.nan)
    return {
        "metric": metric.key, "group": group, "mean": _number(value), "low": _number(low), "high": _number(high),
        "prompts": len(units), "unit": metric.unit, "higher_is_better": metric.higher_is_better,
    }  # fmt: skip


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else ["metric"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
