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


def pairs(before: Results, after: Results, prompts: int, damaged: list[str]) -> list[Entry]:
    """Evenly spaced prompts of the list (none is picked by hand), each with its images before and after.

    Args:
        before: An evaluation.
        after: Of the same prompts.
        prompts: How many.
        damaged: Gets a phrase for each image that cannot be shown.
    """
    groups = list(before.members.values())
    chosen = (groups[position][:IMAGES_PER_PROMPT] for position in numbers.evenly_spaced(len(groups), prompts))
    drawn = [(before.prompts[indices[0]], couples(before, after, indices, damaged)) for indices in chosen]
    return [Entry(prompt, found) for prompt, found in drawn if found]


def extremes(before: Results, after: Results, key: str, damaged: list[str]) -> Extremes | None:
    """The images whose score rose and fell most; None where there is none. ``damaged`` as of :func:`pairs`."""
    old, new = (results.metrics[key].by_image or [] for results in (before, after))
    change = {i: b - a for i, (a, b) in enumerate(zip(old, new, strict=False)) if math.isfinite(b - a)}
    order = sorted(change, key=lambda i: change[i])
    best, worst = (couples(before, after, indices[:EXTREMES], damaged, change) for indices in (order[::-1], order))
    return Extremes(key, best, worst) if best else None


def couples(
    before: Results,
    after: Results,
    indices: Sequence[int],
    damaged: list[str],
    change: Mapping[int, float] | None = None,
    max_side: int = MAX_SIDE,
) -> list[Pair]:
    """These images before and after, as far as both can be shown; ``damaged`` as of :func:`pairs`."""
    drawn = [(i, image(before, i, damaged, max_side), image(after, i, damaged, max_side)) for i in indices]
    changes = change or {}
    return [Pair(old, new, before.prompts[i], changes.get(i, math.nan)) for i, old, new in drawn if old and new]


def image(results: Results, index: int, damaged: list[str], max_side: int = MAX_SIDE) -> str | None:
    """One image of an evaluation; None, and a phrase in ``damaged``, if it is missing or damaged."""
    if index >= len(results.images):
        return None
    return data_uri(results.folder / results.images[index], damaged, max_side)


def data_uri(path: Path, damaged: list[str], max_side: int = MAX_SIDE) -> str | None:
    """An image file as a data URI, at most ``max_side`` pixels.

    Returns None, and adds a phrase to ``damaged``, if the file is missing or damaged: that must not cost the report.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            opened.verify()
        with Image.open(io.BytesIO(data)) as opened:
            if max(opened.size) <= max_side and opened.format == "PNG" and len(data) < 40_000:
                return _uri("png", data)
            scaled = opened.convert("RGB")
            scaled.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            scaled.save(buffer, "WEBP", quality=88)
    except Exception as error:  # Pillow's decoders raise whatever they like
        phrase = f"{path} is missing" if isinstance(error, FileNotFoundError) else f"{path} is no whole image"
        if phrase not in damaged:
            damaged.append(phrase)
        return None
    return _uri("webp", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
