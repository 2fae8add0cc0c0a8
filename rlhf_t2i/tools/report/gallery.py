"""The images of a page, as data URIs: evenly spaced prompts, and those whose score changed most."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from PIL import Image

from rlhf_t2i.evaluation.results import Results

MAX_SIDE = 256
"""Pixels; larger images are scaled down so that the page stays small enough to mail."""
IMAGES_PER_PROMPT, EXTREMES = 4, 6


class Pair(TypedDict):
    """One image before and after."""

    before: str
    after: str
    prompt: str


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` positions of ``count``, from the first to the last."""
    if count <= wanted:
        return list(range(count))
    return [round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)]


def pairs(before: Results, after: Results, prompts: int) -> list[dict[str, Any]]:
    """Evenly spaced prompts of the list (none is picked by hand), each with its images before and after."""
    groups = list(before.members.values())
    found = []
    for position in evenly_spaced(len(groups), prompts):
        images = list(_pairs(before, after, groups[position][:IMAGES_PER_PROMPT]))
        if images:
            found.append({"prompt": images[0][1]["prompt"], "pictures": [pair for _, pair in images]})
    return found


def extremes(before: Results, after: Results, key: str) -> dict[str, Any] | None:
    """The images whose score rose and fell most; None where there is none."""
    old, new = (results.metrics[key].by_image or [] for results in (before, after))
    change = [b - a for a, b in zip(old, new, strict=False)]
    order = sorted((i for i, value in enumerate(change) if math.isfinite(value)), key=lambda i: change[i])

    def tiles(indices: Sequence[int]) -> list[dict[str, Any]]:
        return [{**pair, "change": change[index]} for index, pair in _pairs(before, after, indices)]

    best = tiles(order[::-1][:EXTREMES])
    return {"key": key, "best": best, "worst": tiles(order[:EXTREMES])} if best else None


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


def _pairs(before: Results, after: Results, indices: Sequence[int]) -> Iterator[tuple[int, Pair]]:
    for index in indices:
        old, new = image(before, index), image(after, index)
        if old and new:
            yield index, {"before": old, "after": new, "prompt": before.prompts[index]}


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
