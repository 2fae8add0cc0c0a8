"""Which plots a run's page shows, from the rows of metrics.jsonl.

The regularizer's loss is zero in expectation for every generator (algorithm.md 1.4), so it is in no plot: the
distance to the reference is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf_t2i.evaluation.compare import Comparison
from rlhf_t2i.evaluation.results import Results
from rlhf_t2i.tools.report import plots
from rlhf_t2i.tools.report.plots import Plot, Series
from rlhf_t2i.training.trackers import scalars
from rlhf_t2i.utils import jsonl, stats

Rows = Sequence[Mapping[str, float]]


def read(out: Path) -> Rows:
    """The numbers of a run's metrics.jsonl by step, nested keys joined by slashes.

    Of a step that was repeated after a resume the last row counts.
    """
    latest = {row["step"]: dict(scalars(row)) for row in jsonl.rows(out / "metrics.jsonl")}
    return [latest[step] for step in sorted(latest)]


def training(rows: Rows, units: Mapping[str, str]) -> list[Plot]:
    """Everything worth watching that the rows hold."""
    found = []
    for key in _below(rows, "reward/"):
        name = key.removeprefix("reward/")
        axis = _axis(name, units.get(name, ""))
        learned = any(f"online/{name}/true" in row for row in rows)
        labels = {key: "predicted", f"online/{name}/true": "scored, fresh samples"} if learned else {key: name}
        found += _plot(f"Reward: {name}", _REWARD, pick(rows, labels), axis, f"reward-{slug(name)}")
        trust = {f"online/{name}/{measured}": label for measured, label in _TRUST.items()}
        found += _plot(f"Trust in the learned {name}", _TRUST_NOTE, pick(rows, trust), "share", f"trust-{slug(name)}")
    for title, note, names, ylabel in _PLOTS:
        keys = [key for name in names for key in (_below(rows, name) if name.endswith("/") else [name])]
        labels = {key: "all" if f"{key}/" in names else _words(key.partition("/")[2] or key) for key in keys}
        found += _plot(title, note, pick(rows, labels), ylabel)
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


def pick(rows: Rows, labels: Mapping[str, str]) -> Series:
    """Series over steps by label of the given keys, each over the rows that hold it."""
    held = {label: [(row["step"], row[key]) for row in rows if key in row] for key, label in labels.items()}
    return {label: ([x for x, _ in pairs], [y for _, y in pairs]) for label, pairs in held.items() if pairs}


def slug(text: str) -> str:
    """A word that may stand in an element's id."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower())


def _timing(rows: Rows) -> list[Plot]:
    # What happens in few steps (a checkpoint, a watch) is no phase of a step.
    others = tuple(
        f"timing/{name}"
        for name in ("step", "bytes", "checkpoint", "checkpoint_write", "watch", "weights", "weight_bytes")
    )
    phases = [key for key in _below(rows, "timing/") if key.count("/") == 1 and key not in others]
    series = pick([row for row in rows if row.keys() >= set(phases)], _labels(phases, "timing/"))
    found = []
    if series:
        svg = plots.stacked(series, "step", "seconds per step", "seconds")
        found.append(Plot("Seconds per step", "Where a step's seconds go, by phase.", svg))
    idle, memory = _below(rows, "timing/idle/"), _below(rows, "memory/")
    note = "The share of a step's time in which a process waited."
    found += _plot("Idle share", note, pick(rows, _labels(idle, "timing/idle/")), "idle share of the step")
    series = {k: (x, [v / 2**30 for v in y]) for k, (x, y) in pick(rows, _labels(memory, "memory/")).items()}
    return found + _plot("Peak memory", "Per process.", series, "GiB")


def _plot(title: str, note: str, series: Series, ylabel: str, name: str = "") -> list[Plot]:
    """A plot of curves; none where there is nothing to draw."""
    return [Plot(title, note, plots.curves(series, "step", ylabel, name or slug(title)))] if series else []


def _below(rows: Rows, prefix: str) -> list[str]:
    return sorted({key for row in rows for key in row if key.startswith(prefix)})


def _labels(keys: Sequence[str], prefix: str) -> dict[str, str]:
    return {key: key.removeprefix(prefix) for key in keys}


def _axis(key: str, unit: str) -> str:
    return f"{key} ({unit})" if unit else key


def _words(key: str) -> str:
    return key.replace("_", " ")


_REWARD = "Mean over the step's training images. Judge the gain by the held-out table above, not by this curve."
_TRUST = {"pull": "gradient that counts", "rank_correlation": "rank correlation"}
_TRUST_NOTE = "How a prompt's fresh samples are ordered before they are learned, and how much of the gradient counts."
_PLOTS: list[tuple[str, str, tuple[str, ...], str]] = [
    (
        "Forces on an image",
        "Mean length of the gradients with respect to the generated latents: the regularizer's pull and each reward's "
        "push, already multiplied by its scale.",
        ("grad_norm/divergence", "grad_norm/reward/"),
        "gradient norm at x0",
    ),
    (
        "Angle between the forces",
        "Cosine between reward and regularizer gradients: near -1 they cancel, near 0 they do not meet.",
        ("grad_cosine",),
        "cosine",
    ),
    (
        "Distance to the reference",
        "E[d(y)], the distance that the regularizer holds down. (Its loss averages zero by construction: not shown.)",
        ("divergence",),
        "E[d(y)] (x0 units)",
    ),
    (
        "Denoiser gap by timestep",
        "Mean length of the gap between assistant and reference predictions, by noise level.",
        ("delta_norm/", "delta_norm"),
        "mean gap (x0 units)",
    ),
    (
        "Assistant loss",
        "How well the assistant follows the generator: noise prediction error, lower is better.",
        ("assistant_loss",),
        "mean squared error",
    ),
    ("Parameter gradients", "Global norm before clipping.", ("param_grad_norm/",), "gradient norm"),
    ("Learning rates", "Warm-up to a constant rate.", ("lr/",), "learning rate"),
]
"""Title, note, keys (a slash at the end stands for all keys below) and the axis of the values."""
