"""The ablation's plots and its report.html."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_t2i.tools.ablation.execute import Task
from rlhf_t2i.tools.ablation.schema import Variant
from rlhf_t2i.tools.ablation.tables import Table
from rlhf_t2i.tools.report import gallery, plots, training_plots
from rlhf_t2i.tools.report.page import render
from rlhf_t2i.tools.report.plots import Plot, Point
from rlhf_t2i.tools.report.training_plots import Rows, slug
from rlhf_t2i.training.folder import RunRecord
from rlhf_t2i.utils import files
from rlhf_t2i.utils.jsonl import read_json
from rlhf_t2i.utils.numbers import DASH, duration, evenly_spaced

PROMPTS_SHOWN, PAIRS_SHOWN = 6, 8


def write(table: Table, out: Path) -> Path:
    """Write ``plots/*.svg`` and ``report.html`` of an ablation from the finished rows."""
    drawn = [*_tradeoffs(table), *_curves(table)]
    for plot in drawn:
        files.write_atomic(out / "plots" / f"{slug(plot.title)}.svg", plots.standalone(plot.svg))
    records = [RunRecord.read(task.run / "run.json") for task in table.tasks]
    initial, (best, metric) = table.ablation.initial, _best_row(table)
    damaged: list[str] = []
    context: dict[str, object] = {
        "title": table.ablation.title,
        "table": table,
        "plots": drawn,
        "gallery": _gallery(table, damaged),
        "damaged": damaged,
        "initial": next(row.label for row in table.ablation.rows if row.name == initial),
        "best": best,
        "best_metric": metric,
        "costs": _costs(table.tasks, records),
        "versions": next((record.versions for record in records if record.versions), {}),
    }
    if best is not None:
        before, after = (table.results[name][0] for name in (initial, best.name))
        context["pairs"] = gallery.pairs(before, after, PAIRS_SHOWN, damaged)
        context["extremes"] = gallery.extremes(before, after, metric, damaged)
    return files.write_atomic(out / "report.html", render("ablation.html", context))


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
            name = f"plot-{slug(f'{x}-{y}')}"
            svg = plots.fronts(groups, _lines(table, groups), axes[0], axes[1], name)
            found.append(Plot(f"{labels[1]} against {labels[0]}", note, svg))
    return found


def _lines(table: Table, groups: Mapping[str, Point]) -> dict[str, list[str]]:
    """The labels of every frontier's finished rows."""
    labels = {row.name: row.label for row in table.rows if row.label in groups}
    lines = {front.name: [labels[name] for name in front.rows if name in labels] for front in table.ablation.frontiers}
    return {name: rows for name, rows in lines.items() if len(rows) > 1}


def _point(table: Table, row: str, x: str, y: str) -> Point:
    measured = table.change if table.has_initial else table.estimate
    a, b = measured(row, x), measured(row, y)
    return a.value, b.value, (a.high - a.low) / 2, (b.high - b.low) / 2


def _curves(table: Table) -> list[Plot]:
    """Training rewards and the distance to the reference over images seen, the mean over seeds."""
    runs = {
        row.label: [training_plots.read(task.run) for task in table.tasks if task.variant is row] for row in table.rows
    }
    rewards = {key for seeds in runs.values() for rows in seeds for row in rows[:1] for key in row}
    rewards = {key for key in rewards if key.startswith("reward/")}
    found = []
    for key in [*sorted(rewards), "divergence"]:
        series = {label: line for label, seeds in runs.items() if (line := _mean_line(seeds, key))}
        if series:
            name = key.removeprefix("reward/")
            axis = "E[d(y)], each in its own unit" if key == "divergence" else f"{name}, training images"
            svg = plots.curves(
                series, "images seen (thousands)", axis, f"curve-{slug(key)}", large=True, order=list(runs)
            )
            found.append(Plot(f"{name} over images seen", "The mean over a row's seeds.", svg))
    return found


def _mean_line(seeds: Sequence[Rows], key: str) -> tuple[list[float], list[float]] | None:
    """Values of a key over thousands of images, averaged over the runs that reached a step."""
    points: dict[float, list[float]] = {}
    for row in (row for rows in seeds for row in rows if key in row and "images" in row):
        points.setdefault(row["images"] / 1000, []).append(row[key])
    images = sorted(points)
    return (images, [sum(points[x]) / len(points[x]) for x in images]) if images else None


def _gallery(table: Table, damaged: list[str]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Evenly spaced prompts, each with every row's first image of it: one noise for all."""
    first = {row.label: table.results[row.name][0] for row in table.rows}
    if not first:
        return []
    shown = next(iter(first.values()))
    members, found = list(shown.members.values()), []
    for position in evenly_spaced(len(members), PROMPTS_SHOWN):
        index = members[position][0]
        pictures = [(label, gallery.image(results, index, damaged, 160)) for label, results in first.items()]
        found.append((shown.prompts[index], [(label, uri) for label, uri in pictures if uri]))
    return found


def _best_row(table: Table) -> tuple[Variant | None, str]:
    """The row that gained most of the reward claims refer to (else the first metric), and the metric."""
    key = next((c.at_equal for c in table.ablation.claims if c.at_equal in table.metrics), None)
    key = key or next(iter(table.metrics), "")
    others = [row for row in table.rows if row.name != table.ablation.initial]
    means = {row.name: table.estimate(row.name, key).value for row in others} if key and table.has_initial else {}
    finite = [row for row in others if math.isfinite(means.get(row.name, math.nan))]
    return max(finite, key=lambda row: means[row.name], default=None), key


def _costs(tasks: Sequence[Task], records: Sequence[RunRecord]) -> list[tuple[str, str, str, str]]:
    """Row, training time, evaluation time, device."""
    found = []
    for task, run in zip(tasks, records, strict=True):
        evaluated = read_json(task.evaluated / "cost.json")
        trained = DASH if run.seconds is None else duration(run.seconds)
        if evaluated or run.seconds is not None:
            device = run.device if run.seconds is not None else str(evaluated.get("device", ""))
            found.append((task.name, trained, duration(evaluated.get("seconds")), device))
    return found
