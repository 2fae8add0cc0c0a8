"""The ablation's plots and its report.html."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_t2i.tools.ablation.execute import Task
from rlhf_t2i.tools.ablation.tables import Table
from rlhf_t2i.tools.report import plots
from rlhf_t2i.tools.report.page import render
from rlhf_t2i.tools.report.pictures import data_uri
from rlhf_t2i.tools.report.plots import Plot
from rlhf_t2i.tools.report.training_plots import slug
from rlhf_t2i.utils import files, jsonl
from rlhf_t2i.utils.jsonl import read_json
from rlhf_t2i.utils.numbers import DASH, duration, number

PROMPTS_SHOWN, PAIRS_SHOWN, EXTREMES = 6, 8, 6


def write(table: Table, out: Path) -> Path:
    """Write ``plots/*.svg`` and ``report.html`` of an ablation, from whatever rows are finished."""
    drawn = [*_tradeoffs(table), *_curves(table)]
    for plot in drawn:
        files.write_atomic(out / "plots" / f"{slug(plot.title)}.svg", plots.standalone(plot.svg))
    best = _best_row(table)
    context = {
        "title": table.ablation.title,
        "table": table,
        "cells": _cells(table),
        "plots": drawn,
        "gallery": _gallery(table),
        "best": best,
        "initial": _label(table, table.ablation.initial),
        "pairs": _pairs(table, best) if best else [],
        "extremes": _extremes(table, best) if best else None,
        "costs": _costs(table.tasks),
        "versions": next((v for t in table.tasks if (v := read_json(t.run / "run.json").get("versions"))), {}),
    }
    return files.write_atomic(out / "report.html", render("ablation.html", context))


def _label(table: Table, name: str) -> str:
    return next((row.label for row in table.ablation.rows if row.name == name), name)


def _cells(table: Table) -> list[dict[str, Any]]:
    """The table's rows for the page."""
    rows = []
    for row in table.rows:
        cells = []
        for metric in table.metrics:
            key = metric["metric"]
            found = table.estimate(row.name, key)
            interval = "" if math.isnan(found.low) else f"{number(found.low)} to {number(found.high)}"
            cells.append({"label": table.ablation.label(key), "value": number(found.value), "interval": interval,
                          "paper": f"{row.paper[key]:g}" if key in row.paper else ""})  # fmt: skip
        rows.append({"label": row.label, "note": row.note, "seeds": table.seeds(row.name), "cells": cells})
    return rows


def _tradeoffs(table: Table) -> list[Plot]:
    """The metrics against each other that the recipe names, one point a row."""
    found = []
    keys = [metric["metric"] for metric in table.metrics]
    for x, y in table.ablation.plots:
        if x not in keys or y not in keys:
            continue
        groups = {row.label: (*_point(table, row.name, x, y),) for row in table.rows}
        groups = {label: point for label, point in groups.items() if all(map(math.isfinite, point[:2]))}
        if groups:
            labels = table.ablation.label(x), table.ablation.label(y)
            axes = [f"change of {label}" for label in labels] if table.has_initial else list(labels)
            note = "One point a row; bars are 95% intervals."
            if table.has_initial:
                note += " Changes from the initial row, paired over prompts."
            svg = plots.points(groups, axes[0], axes[1], name=f"plot-{slug(f'{x}-{y}')}", large=True)
            found.append(Plot(f"{labels[1]} against {labels[0]}", note, svg))
    return found


def _point(table: Table, row: str, x: str, y: str) -> tuple[float, float, float, float]:
    measured = table.change if table.has_initial else table.estimate
    a, b = measured(row, x), measured(row, y)
    return a.value, b.value, (a.high - a.low) / 2, (b.high - b.low) / 2


def _curves(table: Table) -> list[Plot]:
    """Training rewards and the distance to the reference over images seen, the mean over seeds."""
    by_row = {
        row.label: [jsonl.by_step(t.run / "metrics.jsonl") for t in table.tasks if t.row is row] for row in table.rows
    }
    by_row = {label: [run for run in runs if run] for label, runs in by_row.items()}
    keys = sorted({k for runs in by_row.values() for run in runs for k in run[0] if k.startswith("reward/")})
    found = []
    for key in [*keys, "divergence"]:
        series = {label: line for label, runs in by_row.items() if (line := _mean_line(runs, key))}
        if series:
            name = key.removeprefix("reward/")
            words = "E[d(y)], each in its own unit" if key == "divergence" else f"{name}, training images"
            svg = plots.curves(series, "images seen (thousands)", words, f"curve-{slug(key)}", large=True)
            found.append(Plot(f"{name} over images seen", "The mean over a row's seeds.", svg))
    return found


def _mean_line(runs: Sequence[list[dict[str, Any]]], key: str) -> tuple[list[float], list[float]] | None:
    """Values of a key over thousands of images, averaged over the runs that reached a step."""
    points: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        for row in run:
            if isinstance(row.get(key), int | float) and "images" in row:
                points.setdefault(row["step"], []).append((row["images"] / 1000, row[key]))
    if not points:
        return None
    steps = sorted(points)
    return [points[s][0][0] for s in steps], [sum(v for _, v in points[s]) / len(points[s]) for s in steps]


def _tasks_of(table: Table, row: str) -> list[Task]:
    return [task for task in table.tasks if task.row.name == row and task.finished]


def _image(task: Task, index: int, side: int = 256) -> str | None:
    return data_uri(task.evaluated / "images" / f"{index:05d}.png", side)


def _gallery(table: Table) -> list[dict[str, Any]]:
    """Evenly spaced prompts, each with every row's first picture of it: one noise for all."""
    if not table.rows:
        return []
    first = _tasks_of(table, table.rows[0].name)[0]
    prompts, per_prompt = _prompts(first)
    count = len(prompts)
    chosen = dict.fromkeys(round(i * (count - 1) / max(1, PROMPTS_SHOWN - 1)) for i in range(PROMPTS_SHOWN))
    found = []
    for index in chosen:
        pictures = [(row.label, _image(_tasks_of(table, row.name)[0], index * per_prompt, 160)) for row in table.rows]
        found.append({"prompt": prompts[index], "pictures": [(label, uri) for label, uri in pictures if uri]})
    return found


def _prompts(task: Task) -> tuple[list[str], int]:
    images = read_json(task.evaluated / "results.json")["images"]
    per_prompt = task.settings.images_per_prompt
    return [image["prompt"] for image in images[::per_prompt]], per_prompt


def _best_row(table: Table) -> dict[str, str] | None:
    """The row that gained most of the reward claims speak of (else the first metric): shown beside the initial one."""
    initial = table.ablation.initial
    if initial not in table.data or not table.metrics:
        return None
    keys = [metric["metric"] for metric in table.metrics]
    key: str = next((claim.at_equal for claim in table.ablation.claims if claim.at_equal in keys), None) or keys[0]
    others = [row for row in table.rows if row.name != initial and math.isfinite(table.estimate(row.name, key).value)]
    if not others:
        return None
    best = max(others, key=lambda row: table.estimate(row.name, key).value)
    return {"name": best.name, "label": best.label, "metric": key}


def _two(table: Table, best: dict[str, str], index: int, prompt: str) -> dict[str, str] | None:
    old = _image(_tasks_of(table, table.ablation.initial)[0], index)
    new = _image(_tasks_of(table, best["name"])[0], index)
    return {"before": old, "after": new, "prompt": prompt} if old and new else None


def _pairs(table: Table, best: dict[str, str]) -> list[dict[str, Any]]:
    prompts, per_prompt = _prompts(_tasks_of(table, table.ablation.initial)[0])
    count = len(prompts)
    chosen = dict.fromkeys(round(i * (count - 1) / max(1, PAIRS_SHOWN - 1)) for i in range(PAIRS_SHOWN))
    found = [(prompts[i], [_two(table, best, i * per_prompt + k, prompts[i]) for k in range(min(per_prompt, 4))])
             for i in chosen]  # fmt: skip
    return [{"prompt": prompt, "pictures": [p for p in pictures if p]} for prompt, pictures in found if any(pictures)]


def _extremes(table: Table, best: dict[str, str]) -> dict[str, Any] | None:
    """The pictures that gained and lost most between the initial row and the best one."""
    scores = []
    for name in (table.ablation.initial, best["name"]):
        data = read_json(_tasks_of(table, name)[0].evaluated / "results.json")
        scores.append(data["metrics"][best["metric"]]["by_image"])
    if not all(scores):
        return None
    change = [b - a if a is not None and b is not None else math.nan for a, b in zip(*scores, strict=True)]
    order = sorted((i for i, value in enumerate(change) if math.isfinite(value)), key=lambda i: change[i])
    prompts, per_prompt = _prompts(_tasks_of(table, table.ablation.initial)[0])

    def tiles(indices: Sequence[int]) -> list[dict[str, Any]]:
        found = [(_two(table, best, i, prompts[i // per_prompt]), change[i]) for i in indices]
        return [pair | {"change": value} for pair, value in found if pair]

    return {"key": best["metric"], "best": tiles(order[::-1][:EXTREMES]), "worst": tiles(order[:EXTREMES])}


def _costs(tasks: Sequence[Task]) -> list[tuple[str, str, str, str]]:
    """Row, training time, evaluation time, device."""
    found = []
    for task in tasks:
        run, evaluated = read_json(task.run / "run.json"), read_json(task.evaluated / "cost.json")
        if run or evaluated:
            trained = duration(run.get("seconds")) if run else DASH
            device = str(run.get("device") or evaluated.get("device") or "")
            found.append((task.name, trained, duration(evaluated.get("seconds")), device))
    return found
