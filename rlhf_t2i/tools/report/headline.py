"""What a run's page opens with: the number that matters, and the pairs of images that show it best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rlhf_t2i.evaluation.compare import Comparison
from rlhf_t2i.evaluation.results import Results
from rlhf_t2i.tools.report import gallery
from rlhf_t2i.tools.report.training_plots import Rows
from rlhf_t2i.utils import numbers, stats

_SIDE = 384
_PAIRS = 3
"""Prompts shown before and after."""
SHARE = "share"
"""The unit of measures whose mean is a share of the images."""
_ENDS = 10
"""Steps whose mean reward is compared, at the start and at the end so far."""


@dataclass(frozen=True)
class Headline:
    """A number, what it is, and pairs of images.

    Attributes:
        number: A change with its sign; of a share, both percentages.
        label: What it measures.
        note: How it came about, in one sentence.
        outcome: ``yes``, ``no`` or ``unclear``; empty while the run goes.
        pairs: Images before and after; [] where there are none.
        caption: Which images these are.
    """

    number: str
    label: str
    note: str
    outcome: str = ""
    pairs: list[gallery.Pair] = field(default_factory=list)
    caption: str = ""


def finished(before: Results, after: Results, comparisons: Sequence[Comparison], damaged: list[str]) -> Headline | None:
    """The change of the first unseen scorer, else of the trained reward; and the images that improved most.

    ``damaged`` gets a phrase for each image that cannot be shown.
    """
    kinds = ("eval", "train")
    row = next((c for kind in kinds for c in comparisons if c.kind == kind and math.isfinite(c.difference)), None)
    if row is None:
        return None
    role = "never trained on" if row.kind == "eval" else "trained on"
    share = row.unit == SHARE
    number = f"{row.before:.0%} \N{RIGHTWARDS ARROW} {row.after:.0%}" if share else numbers.signed(row.difference)
    note = (
        f"{role}: {_change(row)}, on {row.prompts} prompts with the same noise; "
        f"{numbers.signed(row.errors)} standard errors."
    )
    keys = [c.key for c in comparisons if c.kind in kinds]
    pairs = gallery.couples(before, after, _most_improved(before, after, keys), damaged, max_side=_SIDE)
    which = "image" if len(pairs) == 1 else f"{len(pairs)} prompts"
    agree = " and ".join([", ".join(keys[:-1]), keys[-1]] if keys[1:] else keys)
    caption = f"Of {len(before.images)} images the {which} that improved most by {agree}; an even selection is below."
    return Headline(number, row.key, note, row.outcome, pairs, caption if pairs else "")


def _change(row: Comparison) -> str:
    if row.unit == SHARE:
        return f"{100 * row.difference:+.0f} points".replace("-", numbers.MINUS)
    return f"{numbers.number(row.before)} before, {numbers.number(row.after)} after"


def running(rows: Rows, samples: Path, damaged: list[str]) -> Headline | None:
    """The change of the trained reward over the steps so far; and the first and the newest preview.

    ``damaged`` gets a phrase for each image that cannot be shown.
    """
    key = next((key for row in rows for key in row if key.startswith("reward/")), None)
    values = [row[key] for row in rows if key is not None and key in row]
    if key is None or not values:
        return None
    ends = min(_ENDS, max(1, len(values) // 2))
    first, last = (stats.mean(part).value for part in (values[:ends], values[-ends:]))
    note = (
        f"on training images so far: {numbers.number(first)} over the first {ends} steps, {numbers.number(last)} over "
        f"the last {ends}. Judge the run by the table that it ends with."
    )
    files = sorted(samples.glob("step_*.png"))
    number, label = numbers.signed(last - first), key.removeprefix("reward/")
    images = [gallery.data_uri(file, damaged, 2 * _SIDE) for file in (files[0], files[-1])] if len(files) > 1 else []
    if not images or images[0] is None or images[1] is None:
        return Headline(number, label, note)
    caption = f"The same prompts and noise: {_step(files[0])}, and {_step(files[-1])}."
    return Headline(number, label, note, "", [gallery.Pair(images[0], images[1], "")], caption)


def _most_improved(before: Results, after: Results, keys: Sequence[str]) -> list[int]:
    """The images of different prompts on whose improvement the scorers agree most, by each one's smallest gain.

    Gains are in standard deviations over the images; one scorer alone would often pick its own mistake.
    """
    smallest = np.full(len(before.images), np.inf)
    for key in keys:
        old, new = (results.metrics[key].by_image or [] for results in (before, after))
        if not len(old) == len(new) == len(smallest):
            return []
        change = np.asarray(new, dtype=float) - np.asarray(old, dtype=float)
        spread = float(np.nanstd(change)) if np.isfinite(change).any() else 0.0
        sign = 1.0 if after.metrics[key].higher_is_better else -1.0
        smallest = np.minimum(smallest, sign * change / (spread or 1.0))
    best: dict[str, int] = {}
    for index in np.argsort(-np.nan_to_num(smallest, nan=-np.inf), kind="stable").tolist():
        if np.isfinite(smallest[index]):
            best.setdefault(before.prompts[index], index)
    return list(best.values())[:_PAIRS]


def _step(file: Path) -> str:
    return f"step {int(file.stem.removeprefix('step_'))}"
