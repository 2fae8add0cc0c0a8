"""Pictures inside the page, as data URIs."""

from __future__ import annotations

import base64
import io
from pathlib import Path

MAX_SIDE = 256
"""Pixels; larger pictures are scaled down so that the page stays small enough to mail."""


def data_uri(path: Path, max_side: int = MAX_SIDE) -> str | None:
    """A picture as a data URI, at most ``max_side`` pixels; None when it is missing or damaged."""
    from PIL import Image

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            small = max(image.size) <= max_side
            if small and image.format == "PNG" and len(data) < 40_000:
                image.verify()
                return _uri("png", data)
            scaled = image.convert("RGB")
            scaled.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            scaled.save(buffer, "WEBP", quality=88)
    except Exception:  # a picture is an ornament: a damaged one, in whatever way, must not cost the report
        return None
    return _uri("webp", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
