"""Write OUT/report.html of a run: gather what the page shows, and render it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import results
from rlhf_t2i.evaluation.compare import Comparison, compare
from rlhf_t2i.evaluation.results import Results
from rlhf_t2i.recipe import reading
from rlhf_t2i.tools.report import gallery, training_plots
from rlhf_t2i.utils import files, inputs, jsonl
from rlhf_t2i.utils.jsonl import read_json
from rlhf_t2i.utils.numbers import DASH, duration, number, signed

PROMPTS_SHOWN, GRIDS_SHOWN = 12, 4


def write_report(out: Path) -> Path:
    """Write ``OUT/report.html`` from whatever files of a run's folder exist.

    The page holds everything it shows: it opens from a mail or a USB stick and sends no request.
    """
    out = Path(out)
    before, after = (results.read(out / "evaluation" / when) for when in ("before", "after"))
    comparisons, problem = _compare(before, after)
    trained = next((c.key for c in comparisons if c.kind == "train"), None)
    steps = jsonl.flatten(jsonl.by_step(out / "metrics.jsonl"))
    run, recipe_text, recipe = read_json(out / "run.json"), *_recipe(out / "recipe.yaml")
    context: dict[str, Any] = {
        "title": out.resolve().name,
        "summary": _summary(recipe, steps),
        "held_out": bool((recipe.get("data") or {}).get("held_out", True)),
        "comparisons": comparisons,
        "problem": problem,
        "events": [event for event in jsonl.rows(out / "events.jsonl") if event.get("text")],
        "plots": training_plots.training(steps, _units(before, after)),
        "grids": _grids(out / "samples"),
        "cost": _cost(run, steps),
        "run": run,
        "recipe": recipe_text,
    }
    if before and after and not problem:
        context["pairs"] = gallery.pairs(before, after, PROMPTS_SHOWN)
        context["extremes"] = gallery.extremes(before, after, trained) if trained else None
        context["plots"] = [*training_plots.tradeoff(before, after, comparisons), *context["plots"]]
    return files.write_atomic(out / "report.html", render("run.html", context))


def render(template: str, context: dict[str, Any]) -> str:
    """Fill one of the package's templates; every value is escaped but the drawings made by :mod:`.plots`."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "signed": signed, "duration": duration}
    return environment.get_template(template).render(context)


def _compare(before: Results | None, after: Results | None) -> tuple[list[Comparison], str]:
    """The before/after table, or why there is none."""
    if before is None:
        return [], "This run holds no evaluation of the start yet."
    if after is None:
        return [], "This run is not finished: there is no evaluation of its end to compare with the start."
    try:
        return compare(before, after), ""
    except ValueError as error:
        return [], f"No comparison: {error}."


def _recipe(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = inputs.read_text(path, "recipe", inputs.RECIPE)
        data = reading.parse_value(text, str(path))
    except UsageError:
        return "", {}
    return text, data if isinstance(data, dict) else {}


def _summary(recipe: dict[str, Any], steps: Sequence[dict[str, Any]]) -> str:
    """One sentence: what was trained against what."""
    algorithm = recipe.get("algorithm") or {}
    rewards = algorithm.get("rewards") or []
    named = " + ".join(f"{r.get('scale', 1):g} x {r.get('label') or r.get('name')}" for r in rewards) or "no reward"
    divergence = (algorithm.get("divergence") or {}).get("name", "?")
    parts = [f"Reward: {named}", f"divergence: {divergence}"]
    cfg = algorithm.get("cfg") or {}
    if cfg:
        scale = cfg.get("guidance_scale")
        parts.append(f"{cfg.get('mode')} guidance {scale:g}" if scale else "no guidance")
    if steps:
        parts.append(f"{steps[-1]['step']:,} generator updates")
    return "; ".join(parts) + "."


def _units(*evaluations: Results | None) -> dict[str, str]:
    return {m.key: m.unit for evaluation in evaluations if evaluation for m in evaluation.metrics.values()}


def _grids(folder: Path) -> list[dict[str, Any]]:
    """A few preview grids from the first to the last."""
    found = sorted(folder.glob("step_*.png"))
    chosen = [found[index] for index in gallery.evenly_spaced(len(found), GRIDS_SHOWN)]
    grids = [{"step": int(f.stem.removeprefix("step_") or 0), "uri": gallery.data_uri(f, 640)} for f in chosen]
    return [grid for grid in grids if grid["uri"]]


def _cost(run: dict[str, Any], steps: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the run took."""
    seconds, device = run.get("seconds"), str(run.get("device", "cpu"))
    devices = sum(int(group[1]) for group in run.get("placement") or [] if len(group) > 1) or 1
    rows = []
    if seconds is not None:
        unit = "Process-hours on the CPU" if "cpu" in device.lower() else "GPU-hours"
        rows = [
            ("Time", duration(seconds)),
            (unit, f"{seconds * devices / 3600:.3g} ({devices} x {duration(seconds)})"),
        ]
    rows.append(("Device", device))
    if steps:
        images = steps[-1].get("images")
        rows.append(("Images generated for training", f"{images:,}" if images else DASH))
        timed = sorted(row["timing/step"] for row in steps if isinstance(row.get("timing/step"), int | float))
        if timed:
            rows.append(("Seconds per step (median)", number(timed[len(timed) // 2], 3)))
    return rows
