"""Write OUT/report.html of a run: gather what the page shows, and render it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import jinja2

from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import compare
from rlhf_t2i.evaluation.compare import BeforeAfter
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.report import gallery, headline, training_plots
from rlhf_t2i.tools.report.training_plots import Rows
from rlhf_t2i.training.folder import RunRecord
from rlhf_t2i.utils import files, inputs, jsonl, numbers

PROMPTS_SHOWN, GRIDS_SHOWN = 12, 4
T = TypeVar("T")
STEPS_FOR_CURVES = 10
"""Below, a running page has no curves: they say nothing yet, and drawing them takes a second."""


def write_report(out: Path, live: bool = False) -> Path:
    """Write ``OUT/report.html`` from whatever files of a run's folder exist.

    The page holds everything it shows: it opens from a mail or a USB stick and sends no request. A damaged file costs
    its part, and the page names it.

    Args:
        out: The run's folder.
        live: The run is going on: the page says how far it is, and reloads itself.
    """
    out = Path(out)
    damaged: list[str] = []
    unreadable = BeforeAfter(None, None, [], "This run's evaluations cannot be read.")
    measured = _part(lambda: compare.of_run(out / "evaluation"), unreadable, damaged)
    before, after, comparisons = measured.before, measured.after, measured.rows
    steps: Rows = _part(lambda: training_plots.read(out), [], damaged)
    run = _part(lambda: RunRecord.read(out / "run.json"), RunRecord(), damaged)
    events: list[jsonl.Row] = _part(lambda: jsonl.rows(out / "events.jsonl"), [], damaged)
    text, recipe = _recipe(out / "recipe.yaml", damaged)
    units = {m.key: m.unit for evaluation in (before, after) if evaluation for m in evaluation.metrics.values()}
    plots = training_plots.training(steps, units) if not live or len(steps) >= STEPS_FOR_CURVES else []
    context: dict[str, object] = {
        "title": out.resolve().name,
        "live": _position(recipe, steps) if live else "",
        "headline": headline.running(steps, out / "samples", damaged),
        "summary": "" if recipe is None else _summary(recipe, steps),
        "held_out": recipe is None or recipe.data.held_out is not None,
        "comparisons": comparisons,
        "problem": measured.problem,
        "damaged": damaged,
        "events": [event for event in events if event.get("text")],
        "plots": plots,
        "grids": _grids(out / "samples", damaged),
        "cost": _cost(run, steps),
        "run": run,
        "recipe": text,
    }
    if before and after and not measured.problem:
        trained = next((c.key for c in comparisons if c.kind == "train"), None)
        context["headline"] = headline.finished(before, after, comparisons, damaged)
        context["pairs"] = gallery.pairs(before, after, PROMPTS_SHOWN, damaged)
        context["extremes"] = gallery.extremes(before, after, trained, damaged) if trained else None
        context["plots"] = training_plots.tradeoff(before, after, comparisons) + plots
    return files.write_atomic(out / "report.html", render("run.html", context))


def render(template: str, context: Mapping[str, object]) -> str:
    """Fill one of the package's templates; every value is escaped but the drawings made by :mod:`.plots`."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {name: getattr(numbers, name) for name in ("number", "signed", "duration")}
    return environment.get_template(template).render(context)


def _part(read: Callable[[], T], otherwise: T, damaged: list[str]) -> T:
    """What a file holds; of a damaged one ``otherwise``, and its error message is added to ``damaged``."""
    try:
        return read()
    except UsageError as error:
        damaged.append(str(error))
        return otherwise


def _recipe(path: Path, damaged: list[str]) -> tuple[str, Recipe | None]:
    """The text of a run's recipe, and the recipe if this version can read it; ("", None) without one."""
    if not path.exists():
        return "", None
    text = _part(lambda: inputs.read_text(path, "recipe", inputs.RECIPE), "", damaged)
    return text, _part(lambda: reading.load(path), None, damaged) if text else None


def _summary(recipe: Recipe, steps: Rows) -> str:
    """One sentence: what was trained against what."""
    algorithm = recipe.algorithm
    named = " + ".join(f"{reward.scale:g} x {reward.key}" for reward in algorithm.rewards) or "no reward"
    scale = algorithm.cfg.guidance_scale
    guidance = f"{algorithm.cfg.mode} guidance {scale:g}" if scale else "no guidance"
    done = f"; {steps[-1]['step']:,.0f} generator updates" if steps else ""
    return f"Reward: {named}; divergence: {algorithm.divergence.name}; {guidance}{done}."


def _position(recipe: Recipe | None, steps: Rows) -> str:
    """How far a run is."""
    done = f"{steps[-1]['step']:,.0f}" if steps else "0"
    return f"Step {done} of {recipe.steps:,}" if recipe else f"Step {done}"


def _grids(folder: Path, damaged: list[str]) -> list[tuple[int, str]]:
    """A few preview grids from the first to the last: the step and the image."""
    found = sorted(folder.glob("step_*.png"))
    chosen = [found[index] for index in numbers.evenly_spaced(len(found), GRIDS_SHOWN)]
    grids = [(int(file.stem.removeprefix("step_") or 0), gallery.data_uri(file, damaged, 640)) for file in chosen]
    return [(step, uri) for step, uri in grids if uri]


def _cost(run: RunRecord, steps: Rows) -> list[tuple[str, str]]:
    """What the run took."""
    rows = [("Device", run.device)]
    if run.seconds is not None:
        unit = "Process-hours on the CPU" if "cpu" in run.device.lower() else "GPU-hours"
        devices, taken = sum(count for _, count, _ in run.placement) or 1, numbers.duration(run.seconds)
        hours = f"{run.seconds * devices / 3600:.3g} ({devices} x {taken})"
        rows = [("Time", taken), (unit, hours), *rows]
    if steps:
        images = steps[-1].get("images")
        rows.append(("Images generated for training", f"{images:,.0f}" if images else numbers.DASH))
    if timed := [row["timing/step"] for row in steps if "timing/step" in row]:
        rows.append(("Seconds per step (median)", numbers.number(statistics.median_high(timed), 3)))
    return rows
