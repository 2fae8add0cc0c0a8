"""What a run's page opens with: the number that matters, and the pair of images that shows it best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf_t2i.evaluation.compare import Comparison
from rlhf_t2i.evaluation.results import Results
from rlhf_t2i.tools.report import gallery
from rlhf_t2i.tools.report.training_plots import Rows
from rlhf_t2i.utils import numbers, stats

_SIDE = 384
_ENDS = 10
"""Steps whose mean reward is compared, at the start and at the end so far."""


@dataclass(frozen=True)
class Headline:
    """A number, what it is, and a pair of images.

    Attributes:
        number: With its sign.
        label: What it measures.
        note: How it came about, in one sentence.
        outcome: ``yes``, ``no`` or ``unclear``; empty while the run goes.
        before: Data URI; None where there are no images.
        after: Data URI.
        caption: Which images these are.
    """

    number: str
    label: str
    note: str
    outcome: str = ""
    before: str | None = None
    after: str | None = None
    caption: str = ""


def finished(before: Results, after: Results, comparisons: Sequence[Comparison]) -> Headline | None:
    """The change of the first unseen scorer, else of the trained reward; and the image that improved most."""
    kinds = ("eval", "train")
    row = next((c for kind in kinds for c in comparisons if c.kind == kind and math.isfinite(c.difference)), None)
    if row is None:
        return None
    role = "never trained on" if row.kind == "eval" else "trained on"
    note = (
        f"{role}: {numbers.number(row.before)} before, {numbers.number(row.after)} after, on {row.prompts} prompts "
        f"with the same noise; {numbers.signed(row.errors)} standard errors."
    )
    number = numbers.signed(row.difference)
    keys = [c.key for c in comparisons if c.kind in kinds]
    index = _most_improved(before, after, keys)
    images = [] if index is None else [gallery.image(results, index, _SIDE) for results in (before, after)]
    if index is None or not all(images):
        return Headline(number, row.key, note, row.outcome)
    agree = " and ".join(keys)
    caption = (
        f"{before.prompts[index]}. Of {len(before.images)} images the one that improved most by {agree}; an even "
        "selection is below."
    )
    return Headline(number, row.key, note, row.outcome, images[0], images[1], caption)


def running(rows: Rows, samples: Path) -> Headline | None:
    """The change of the trained reward over the steps so far; and the first and the newest preview."""
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
    images = [gallery.data_uri(file, 2 * _SIDE) for file in (files[0], files[-1])] if len(files) > 1 else []
    if not all(images) or not images:
        return Headline(numbers.signed(last - first), key.removeprefix("reward/"), note)
    caption = f"The same prompts and noise: {_step(files[0])}, and {_step(files[-1])}."
    return Headline(numbers.signed(last - first), key.removeprefix("reward/"), note, "", images[0], images[1], caption)


def _most_improved(before: Results, after: Results, keys: Sequence[str]) -> int | None:
    """The image on whose improvement the scorers agree most: the largest of each image's smallest gain.

    Gains are in standard deviations over the images; one scorer alone would often pick its own mistake.
    """
    smallest = np.full(len(before.images), np.inf)
    for key in keys:
        old, new = (results.metrics[key].by_image or [] for results in (before, after))
        if not len(old) == len(new) == len(smallest):
            return None
        change = np.asarray(new, dtype=float) - np.asarray(old, dtype=float)
        spread = float(np.nanstd(change)) if np.isfinite(change).any() else 0.0
        sign = 1.0 if after.metrics[key].higher_is_better else -1.0
        smallest = np.minimum(smallest, sign * change / (spread or 1.0))
    smallest[~np.isfinite(smallest)] = -np.inf
    return int(smallest.argmax()) if np.isfinite(smallest).any() else None


def _step(file: Path) -> str:
    return f"step {int(file.stem.removeprefix('step_'))}"
