"""The ablation's plots and its report.html."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_t2i.tools.ablation.execute import Task
from rlhf_t2i.tools.ablation.tables import Table
from rlhf_t2i.tools.report import gallery, plots
from rlhf_t2i.tools.report.page import render
from rlhf_t2i.tools.report.plots import Plot
from rlhf_t2i.tools.report.training_plots import slug
from rlhf_t2i.utils import files, jsonl
from rlhf_t2i.utils.jsonl import read_json
from rlhf_t2i.utils.numbers import DASH, duration, number

PROMPTS_SHOWN, PAIRS_SHOWN = 6, 8


def write(table: Table, out: Path) -> Path:
    """Write ``plots/*.svg`` and ``report.html`` of an ablation from the finished rows."""
    drawn = [*_tradeoffs(table), *_curves(table)]
    for plot in drawn:
        files.write_atomic(out / "plots" / f"{slug(plot.title)}.svg", plots.standalone(plot.svg))
    best = _best_row(table)
    context: dict[str, Any] = {
        "title": table.ablation.title,
        "table": table,
        "cells": _cells(table),
        "plots": drawn,
        "gallery": _gallery(table),
        "best": best,
        "initial": _label(table, table.ablation.initial),
        "pairs": [],
        "costs": _costs(table.tasks),
        "versions": next((v for t in table.tasks if (v := read_json(t.run / "run.json").get("versions"))), {}),
    }
    if best:
        before, after = (table.results[name][0] for name in (table.ablation.initial, best["name"]))
        context["pairs"] = gallery.pairs(before, after, PAIRS_SHOWN)
        context["extremes"] = gallery.extremes(before, after, best["metric"])
    return files.write_atomic(out / "report.html", render("ablation.html", context))


def _label(table: Table, name: str) -> str:
    return next((row.label for row in table.ablation.rows if row.name == name), name)


def _cells(table: Table) -> list[dict[str, Any]]:
    """The table's rows for the page."""
    rows = []
    for row in table.rows:
        cells = []
        for key in table.metrics:
            found = table.estimate(row.name, key)
            interval = "" if math.isnan(found.low) else f"{number(found.low)} to {number(found.high)}"
            cells.append({"label": table.ablation.label(key), "value": number(found.value), "interval": interval,
                          "paper": f"{row.paper[key]:g}" if key in row.paper else ""})  # fmt: skip
        rows.append({"label": row.label, "note": row.note, "seeds": table.seeds(row.name), "cells": cells})
    return rows


def _tradeoffs(table: Table) -> list[Plot]:
    """The metrics against each other that the recipe names, one point per row."""
    found = []
    for x, y in table.ablation.plots:
        if x not in table.metrics or y not in table.metrics:
            continue
        groups = {row.label: _point(table, row.name, x, y) for row in table.rows}
        groups = {label: point for label, point in groups.items() if all(map(math.isfinite, point[:2]))}
        if groups:
            labels = table.ablation.label(x), table.ablation.label(y)
            axes = [f"change of {label}" for label in labels] if table.has_initial else list(labels)
            note = "One point per row; bars are 95% intervals."
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
        row.label: [jsonl.by_step(t.run / "metrics.jsonl") for t in table.tasks if t.variant is row]
        for row in table.rows
    }
    by_row = {label: [run for run in runs if run] for label, runs in by_row.items()}
    keys = sorted({k for runs in by_row.values() for run in runs for k in run[0] if k.startswith("reward/")})
    found = []
    for key in [*keys, "divergence"]:
        series = {label: line for label, runs in by_row.items() if (line := _mean_line(runs, key))}
        if series:
            name = key.removeprefix("reward/")
            axis = "E[d(y)], each in its own unit" if key == "divergence" else f"{name}, training images"
            svg = plots.curves(series, "images seen (thousands)", axis, f"curve-{slug(key)}", large=True)
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


def _gallery(table: Table) -> list[dict[str, Any]]:
    """Evenly spaced prompts, each with every row's first image of it: one noise for all."""
    if not table.rows:
        return []
    first = {row.label: table.results[row.name][0] for row in table.rows}
    members = list(next(iter(first.values())).members.values())
    found = []
    for position in gallery.evenly_spaced(len(members), PROMPTS_SHOWN):
        index = members[position][0]
        pictures = [(label, gallery.image(results, index, 160)) for label, results in first.items()]
        prompt = next(iter(first.values())).prompts[index]
        found.append({"prompt": prompt, "pictures": [(label, uri) for label, uri in pictures if uri]})
    return found


def _best_row(table: Table) -> dict[str, str] | None:
    """The row that gained most of the reward claims refer to (else the first metric): shown beside the initial one."""
    if not table.has_initial or not table.metrics:
        return None
    key = next((c.at_equal for c in table.ablation.claims if c.at_equal in table.metrics), None)
    key = key or next(iter(table.metrics))
    others = [(table.estimate(row.name, key).value, row) for row in table.rows if row.name != table.ablation.initial]
    others = [(mean, row) for mean, row in others if math.isfinite(mean)]
    if not others:
        return None
    _, best = max(others, key=lambda pair: pair[0])
    return {"name": best.name, "label": best.label, "metric": key}


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
