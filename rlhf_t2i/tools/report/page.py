"""Write OUT/report.html of a run: gather what the page shows, and render it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation.compare import Row, compare, verdicts
from rlhf_t2i.evaluation.reading import Evaluated, evaluated
from rlhf_t2i.recipe import reading
from rlhf_t2i.tools.report import training_plots
from rlhf_t2i.tools.report.pictures import data_uri
from rlhf_t2i.utils import files, jsonl
from rlhf_t2i.utils.jsonl import read_json
from rlhf_t2i.utils.numbers import DASH, duration, number, signed

PROMPTS_SHOWN, IMAGES_A_PROMPT, EXTREMES, SHEETS = 12, 4, 6, 4


def write_report(out: Path) -> Path:
    """Write ``OUT/report.html`` from the files of a run folder, whatever of them is there yet.

    The page holds everything it shows: it opens from a mail or a USB stick and asks no server for anything.
    """
    out = Path(out)
    before = evaluated(out / "evaluation" / "before.json")
    after = evaluated(out / "evaluation" / "after.json")
    rows, problem = _rows(before, after)
    steps = jsonl.flatten(jsonl.by_step(out / "metrics.jsonl"))
    run, recipe_text, recipe = read_json(out / "run.json"), *_recipe(out / "recipe.yaml")
    context = {
        "title": out.resolve().name,
        "summary": _summary(recipe, steps),
        "held_out": bool((recipe.get("data") or {}).get("held_out", True)),
        "rows": rows,
        "verdicts": verdicts(rows),
        "problem": problem,
        "events": [event for event in jsonl.rows(out / "events.jsonl") if event.get("text")],
        "units": {row.key: row.unit for row in rows},
        "pairs": _pairs(out, before, after) if not problem else [],
        "extremes": _extremes(out, before, after, rows) if not problem else None,
        "plots": [
            *training_plots.tradeoff(before, after, rows),
            *training_plots.training(steps, _units(after, before)),
        ],
        "sheets": _sheets(out / "samples"),
        "cost": _cost(run, steps),
        "run": run,
        "recipe": recipe_text,
    }
    return files.write_atomic(out / "report.html", render("run.html", context))


def render(template: str, context: dict[str, Any]) -> str:
    """Fill one of the package's templates; every value is escaped but the drawings made by :mod:`.plots`."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "signed": signed, "duration": duration}
    return environment.get_template(template).render(context)


def _rows(before: Evaluated | None, after: Evaluated | None) -> tuple[list[Row], str]:
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
        text = path.read_text("utf-8")
        data = reading.parse_value(text, str(path))
    except (OSError, ValueError, UsageError):
        return "", {}
    return text, data if isinstance(data, dict) else {}


def _summary(recipe: dict[str, Any], steps: Sequence[dict[str, Any]]) -> str:
    """One sentence: what was trained against what."""
    algorithm = recipe.get("algorithm") or {}
    rewards = algorithm.get("rewards") or []
    named = " + ".join(f"{r.get('scale', 1):g} x {r.get('label') or r.get('name')}" for r in rewards) or "no reward"
    divergence = (algorithm.get("divergence") or {}).get("name", "?")
    cfg = algorithm.get("cfg") or {}
    parts = [f"Reward: {named}", f"divergence: {divergence}"]
    if cfg:
        parts.append(
            f"{cfg.get('mode')} guidance {cfg.get('guidance_scale'):g}" if cfg.get("guidance_scale") else "no guidance"
        )
    if steps:
        parts.append(f"{steps[-1]['step']:,} generator updates")
    return "; ".join(parts) + "."


def _units(*evaluations: Evaluated | None) -> dict[str, str]:
    return next((e.units for e in evaluations if e is not None), {})


def _pairs(out: Path, before: Evaluated | None, after: Evaluated | None) -> list[dict[str, Any]]:
    """Evenly spaced prompts (none was chosen), each with its pictures before and after."""
    if not before or not after or not before.images or len(before.images) != len(after.images):
        return []
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(before.prompts[: len(before.images)]):
        groups.setdefault(prompt, []).append(index)
    prompts = list(groups)
    chosen = [prompts[round(i * (len(prompts) - 1) / max(1, PROMPTS_SHOWN - 1))] for i in range(PROMPTS_SHOWN)]
    pairs = []
    for prompt in dict.fromkeys(chosen):
        pictures = [_pair(out, before, after, index) for index in groups[prompt][:IMAGES_A_PROMPT]]
        pairs.append({"prompt": prompt, "pictures": [picture for picture in pictures if picture]})
    return [pair for pair in pairs if pair["pictures"]]


def _pair(out: Path, before: Evaluated, after: Evaluated, index: int) -> dict[str, str] | None:
    folder = out / "evaluation"
    old, new = data_uri(folder / before.images[index]), data_uri(folder / after.images[index])
    return {"before": old, "after": new, "prompt": before.prompts[index]} if old and new else None


def _extremes(
    out: Path, before: Evaluated | None, after: Evaluated | None, rows: Sequence[Row]
) -> dict[str, Any] | None:
    """The pictures whose trained reward rose and fell most."""
    key = next((row.key for row in rows if row.kind == "train"), None)
    if not before or not after or key is None:
        return None
    count = min(len(before.images), len(after.images), len(before.prompts))
    change = [after.scores[key][i] - before.scores[key][i] for i in range(count)]
    order = sorted((i for i in range(count) if math.isfinite(change[i])), key=lambda i: change[i])

    def tiles(indices: Sequence[int]) -> list[dict[str, Any]]:
        found = [(_pair(out, before, after, index), change[index]) for index in indices]
        return [pair | {"change": value} for pair, value in found if pair]

    best, worst = tiles(order[::-1][:EXTREMES]), tiles(order[:EXTREMES])
    return {"key": key, "best": best, "worst": worst} if best else None


def _sheets(folder: Path) -> list[dict[str, Any]]:
    """A few preview grids from the first to the last."""
    found = sorted(folder.glob("step_*.png"))
    if len(found) > SHEETS:
        found = [found[round(i * (len(found) - 1) / (SHEETS - 1))] for i in range(SHEETS)]
    sheets = [{"step": int(f.stem.removeprefix("step_") or 0), "uri": data_uri(f, 640)} for f in found]
    return [sheet for sheet in sheets if sheet["uri"]]


def _cost(run: dict[str, Any], steps: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the run took, in plain units."""
    seconds = run.get("seconds")
    device = str(run.get("device", "cpu"))
    devices = sum(int(group[1]) for group in run.get("placement") or [] if len(group) > 1) or 1
    rows = [("Time", duration(seconds))] if seconds is not None else []
    if seconds is not None:
        unit = "Process-hours on the CPU" if "cpu" in device.lower() else "GPU-hours"
        rows.append((unit, f"{seconds * devices / 3600:.3g} ({devices} x {duration(seconds)})"))
    rows.append(("Device", device))
    if steps:
        images = steps[-1].get("images")
        rows.append(("Images generated for training", f"{images:,}" if images else DASH))
        timed = [row["timing/step"] for row in steps if isinstance(row.get("timing/step"), int | float)]
        if timed:
            middle = sorted(timed)[len(timed) // 2]
            rows.append(("Seconds a step (median)", number(middle, 3)))
    return rows
