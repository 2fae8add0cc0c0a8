"""Which plots a run's page shows, from the rows of metrics.jsonl.

The regularizer's loss is zero in expectation for every generator (algorithm.md 1.4), so it is in no plot: the
distance to the reference is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlhf_t2i.evaluation.compare import Comparison
from rlhf_t2i.evaluation.results import Results
from rlhf_t2i.tools.report import plots
from rlhf_t2i.tools.report.plots import Plot
from rlhf_t2i.utils import stats

Series = dict[str, tuple[list[float], list[float]]]
Rows = Sequence[dict[str, Any]]


def training(rows: Rows, units: Mapping[str, str]) -> list[Plot]:
    """Everything worth watching that the rows (flattened, in order of step) hold."""
    found = [_reward(rows, key, units.get(key, "")) for key in _keys(rows, "reward/")]
    for title, note, keys, ylabel in _PLOTS:
        series = pick(rows, keys(rows))
        if series:
            found.append(_plot(title, note, series, ylabel))
    return found + _timing(rows)


def tradeoff(before: Results, after: Results, comparisons: Sequence[Comparison]) -> list[Plot]:
    """Each reward against diversity, before and after, with standard errors."""
    measure = next((c.key for c in comparisons if c.kind == "diversity"), None)
    if measure is None:
        return []
    found = []
    for comparison in (c for c in comparisons if c.kind in ("train", "eval")):
        key, points = comparison.key, {}
        for label, evaluation in (("before", before), ("after", after)):
            x, y = (stats.mean(evaluation.metrics[name].by_prompt) for name in (measure, key))
            points[label] = (x.value, y.value, x.error, y.error)
        svg = plots.points(
            points, f"diversity ({_words(measure)})", _axis(key, comparison.unit), f"tradeoff-{slug(key)}",
            arrows=[("before", "after")],
        )  # fmt: skip
        role = "trained on" if comparison.kind == "train" else "never trained on"
        note = f"{key} is {role}. Up is better, left is less varied; bars are one standard error over prompts."
        found.append(Plot(f"{key} against diversity", note, svg))
    return found


def pick(rows: Rows, labels: Mapping[str, str], x: str = "step") -> Series:
    """Series by label of the given keys, each over the rows that hold it."""
    series: Series = {}
    for key, label in labels.items():
        held = [(row[x], row[key]) for row in rows if isinstance(row.get(key), int | float) and x in row]
        if held:
            series[label] = ([float(a) for a, _ in held], [float(b) for _, b in held])
    return series


def slug(text: str) -> str:
    """A word that may stand in an element's id."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower())


def _reward(rows: Rows, key: str, unit: str) -> Plot:
    series = pick(rows, {f"reward/{key}": key})
    note = "Mean over the step's training images. Judge the gain by the held-out table above, not by this curve."
    return Plot(f"Reward: {key}", note, plots.curves(series, "step", _axis(key, unit), f"reward-{slug(key)}"))


def _timing(rows: Rows) -> list[Plot]:
    # What happens in few steps (a checkpoint, a watch) is no phase of a step.
    others = ("timing/step", "timing/bytes", "timing/checkpoint", "timing/watch")
    phases = [k for k in _all(rows, "timing/") if k.count("/") == 1 and k not in others]
    whole = [row for row in rows if all(isinstance(row.get(k), int | float) for k in phases)]
    found = []
    if phases and whole:
        series = pick(whole, {key: key.removeprefix("timing/") for key in phases})
        note = "Where a step's seconds go, by phase."
        found.append(Plot("Seconds per step", note, plots.stacked(series, "step", "seconds per step", "seconds")))
    series = pick(rows, {key: key.removeprefix("timing/idle/") for key in _all(rows, "timing/idle/")})
    if series:
        note = "The share of a step's time in which a process waited."
        found.append(_plot("Idle share", note, series, "idle share of the step"))
    memory = _all(rows, "memory/")
    if memory:
        scaled = [{"step": row["step"]} | {k: row[k] / 2**30 for k in memory if row.get(k) is not None} for row in rows]
        series = pick(scaled, {key: key.removeprefix("memory/") for key in memory})
        found.append(_plot("Peak memory", "Per process.", series, "GiB"))
    return found


def _plot(title: str, note: str, series: Series, ylabel: str) -> Plot:
    return Plot(title, note, plots.curves(series, "step", ylabel, slug(title)))


def _all(rows: Rows, prefix: str) -> list[str]:
    return sorted({key for row in rows for key in row if key.startswith(prefix)})


def _keys(rows: Rows, prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in _all(rows, prefix)]


def _axis(key: str, unit: str) -> str:
    return f"{key} ({unit})" if unit else key


def _words(key: str) -> str:
    return key.replace("_", " ")


def _named(*names: str) -> Callable[[Rows], dict[str, str]]:
    return lambda rows: {name: _words(name) for name in names}


def _below(prefix: str, extra: Iterable[str] = ()) -> Callable[[Rows], dict[str, str]]:
    return lambda rows: {k: k.removeprefix(prefix) for k in _all(rows, prefix)} | dict.fromkeys(extra, "all")


def _forces(rows: Rows) -> dict[str, str]:
    keys = ["grad_norm/divergence", *_all(rows, "grad_norm/reward/")]
    return {key: key.removeprefix("grad_norm/") for key in keys}


_PLOTS: list[tuple[str, str, Callable[[Rows], dict[str, str]], str]] = [
    (
        "Forces on an image",
        "Mean length of the gradients with respect to the generated latents: the regularizer's pull and each reward's "
        "push, already multiplied by its scale.",
        _forces,
        "gradient norm at x0",
    ),
    (
        "Angle between the forces",
        "Cosine between reward and regularizer gradients: near -1 they cancel, near 0 they do not meet.",
        _named("grad_cosine"),
        "cosine",
    ),
    (
        "Distance to the reference",
        "E[d(y)], the distance that the regularizer holds down. (Its loss averages zero by construction: not shown.)",
        _named("divergence"),
        "E[d(y)] (x0 units)",
    ),
    (
        "Denoiser gap by timestep",
        "Mean length of the gap between assistant and reference predictions, by noise level.",
        _below("delta_norm/", ["delta_norm"]),
        "mean gap (x0 units)",
    ),
    (
        "Assistant loss",
        "How well the assistant follows the generator: noise prediction error, lower is better.",
        _named("assistant_loss"),
        "mean squared error",
    ),
    (
        "Parameter gradients",
        "Global norm before clipping.",
        _below("param_grad_norm/"),
        "gradient norm",
    ),
    ("Learning rates", "Warm-up to a constant rate.", _below("lr/"), "learning rate"),
]
