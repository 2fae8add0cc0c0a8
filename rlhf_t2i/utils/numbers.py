"""Numbers formatted for reading, and positions spread over a list."""

from __future__ import annotations

import math

DASH, MINUS, INFINITE = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{INFINITY}"


def number(value: float | None, digits: int = 4) -> str:
    """A few significant digits; a dash for what was not measured."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return INFINITE if value > 0 else MINUS + INFINITE
    text = f"{value:.{digits}g}"
    if "e" in text and abs(value) >= 1:
        text = f"{value:.0f}"
    return text.replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """A number with its sign."""
    text = number(value, digits)
    return f"+{text}" if value is not None and value > 0 else text


def duration(seconds: float | None) -> str:
    """``95 s``, ``12 min 3 s``, ``3 h 05 min``."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` positions of ``count``, from the first to the last."""
    if count <= wanted:
        return list(range(count))
    return [round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)]
