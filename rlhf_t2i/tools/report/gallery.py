"""The images of a page, as data URIs: evenly spaced prompts, and those whose score changed most."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rlhf_t2i.evaluation.results import Results
from rlhf_t2i.utils import numbers

MAX_SIDE = 256
"""Pixels; larger images are scaled down so that the page stays small enough to mail."""
IMAGES_PER_PROMPT, EXTREMES = 4, 6


@dataclass(frozen=True)
class Pair:
    """One image before and after, as data URIs, and how much its score changed."""

    before: str
    after: str
    prompt: str
    change: float = math.nan


@dataclass(frozen=True)
class Entry:
    """A prompt and its images."""

    prompt: str
    pictures: list[Pair]


@dataclass(frozen=True)
class Extremes:
    """The images whose score ``key`` rose most, and fell most."""

    key: str
    best: list[Pair]
    worst: list[Pair]


def pairs(before: Results, after: Results, prompts: int) -> list[Entry]:
    """Evenly spaced prompts of the list (none is picked by hand), each with its images before and after."""
    groups = list(before.members.values())
    chosen = (groups[position][:IMAGES_PER_PROMPT] for position in numbers.evenly_spaced(len(groups), prompts))
    return [
        Entry(before.prompts[indices[0]], found) for indices in chosen if (found := couples(before, after, indices))
    ]


def extremes(before: Results, after: Results, key: str) -> Extremes | None:
    """The images whose score rose and fell most; None where there is none."""
    old, new = (results.metrics[key].by_image or [] for results in (before, after))
    change = {i: b - a for i, (a, b) in enumerate(zip(old, new, strict=False)) if math.isfinite(b - a)}
    order = sorted(change, key=lambda i: change[i])
    best, worst = (couples(before, after, indices[:EXTREMES], change) for indices in (order[::-1], order))
    return Extremes(key, best, worst) if best else None


def couples(
    before: Results,
    after: Results,
    indices: Sequence[int],
    change: Mapping[int, float] | None = None,
    max_side: int = MAX_SIDE,
) -> list[Pair]:
    """These images before and after, as far as both are there."""
    drawn = ((i, image(before, i, max_side), image(after, i, max_side)) for i in indices)
    changes = change or {}
    return [Pair(old, new, before.prompts[i], changes.get(i, math.nan)) for i, old, new in drawn if old and new]


def image(results: Results, index: int, max_side: int = MAX_SIDE) -> str | None:
    """One image of an evaluation; None where it is missing."""
    return data_uri(results.folder / results.images[index], max_side) if index < len(results.images) else None


def data_uri(path: Path, max_side: int = MAX_SIDE) -> str | None:
    """An image file as a data URI, at most ``max_side`` pixels; None when it is missing or damaged."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            small = max(opened.size) <= max_side
            if small and opened.format == "PNG" and len(data) < 40_000:
                opened.verify()
                return _uri("png", data)
            scaled = opened.convert("RGB")
            scaled.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            scaled.save(buffer, "WEBP", quality=88)
    except Exception:  # a damaged image, in whatever way, must not cost the report
        return None
    return _uri("webp", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
