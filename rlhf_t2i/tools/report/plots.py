"""Plots as inline SVG: drawn by matplotlib, colored by the page, so that light and dark share one drawing."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""``(x, y)`` by label."""
Point = tuple[float, float, float, float]
"""x, y, the half-width of x's bar, the half-width of y's bar."""

# Placeholder colors, replaced in the SVG by the page's variables: no drawing holds a color of its own.
_INK, _FAINT = "#010101", "#020202"
_SERIES = [f"#0303{index:02x}" for index in range(8)]
_VARIABLES = {_INK: "var(--ink-soft)", _FAINT: "var(--line)"} | {
    color: f"var(--series-{index})" for index, color in enumerate(_SERIES)
}
_LIGHT = {"ink-soft": "#5b6470", "line": "#dfe2e6", "series-0": "#0b6e75", "series-1": "#c2571a",
          "series-2": "#5a4fa3", "series-3": "#a8861b", "series-4": "#b13a72", "series-5": "#3b7bbf",
          "series-6": "#4d7f2f", "series-7": "#6b6f76"}  # fmt: skip
_DASHES = ["-", "--", ":"]
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.color": _FAINT,
    "ytick.labelcolor": _INK,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Plot:
    """A drawing and what to say about it."""

    title: str
    note: str
    svg: str


def curves(series: Series, xlabel: str, ylabel: str, name: str, large: bool = False) -> str:
    """Lines by label: the values faint, their running mean on top."""

    def draw(axes: Axes) -> None:
        for index, (label, (x, y)) in enumerate(series.items()):
            color = _SERIES[index % len(_SERIES)]
            smooth = running_mean(y, max(1, len(y) // 20))
            if len(y) > 40 and not large:
                axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
            style: dict[str, Any] = {"marker": "o", "markersize": 3} if len(y) < 12 else {}
            style["linestyle"] = _DASHES[index // len(_SERIES) % len(_DASHES)]
            axes.plot(x, smooth if len(y) > 40 else y, color=color, label=label, **style)
        _label(axes, xlabel, ylabel, legend=len(series) > 1)

    return _svg(draw, name, f"{ylabel} over {xlabel}", *_size(large, len(series)))


def stacked(series: Series, xlabel: str, ylabel: str, name: str) -> str:
    """Parts of a whole over x, which all parts share, one band a label."""

    def draw(axes: Axes) -> None:
        xs = next(iter(series.values()))[0]
        bands = [running_mean(y, max(1, len(y) // 20)) for _, y in series.values()]
        axes.stackplot(xs, *bands, labels=list(series), colors=_SERIES, alpha=0.75)
        axes.set_ylim(bottom=0)
        _label(axes, xlabel, ylabel, legend=True)

    return _svg(draw, name, f"{ylabel} over {xlabel}")


def points(
    groups: Mapping[str, Point],
    xlabel: str,
    ylabel: str,
    name: str,
    arrows: Sequence[tuple[str, str]] = (),
    large: bool = False,
) -> str:
    """Labeled points with error bars; an arrow leads from the first to the second label of each pair."""

    def draw(axes: Axes) -> None:
        for index, (label, (x, y, dx, dy)) in enumerate(groups.items()):
            color, marker = _SERIES[index % len(_SERIES)], "os^Dvp"[index // len(_SERIES) % 6]
            axes.errorbar(
                x, y, xerr=_bar(dx), yerr=_bar(dy), fmt=marker, color=color, capsize=2, markersize=5, label=label
            )
        for start, end in arrows:
            axes.annotate(
                "", groups[end][:2], groups[start][:2],
                arrowprops={"arrowstyle": "->", "color": _INK, "shrinkA": 6, "shrinkB": 6, "alpha": 0.6},
            )  # fmt: skip
        axes.margins(0.15)
        axes.locator_params(axis="x", nbins=6)
        _label(axes, xlabel, ylabel, legend=True)

    return _svg(draw, name, f"{ylabel} against {xlabel}", *_size(large, len(groups)))


def standalone(svg: str) -> str:
    """A page's drawing as a file of its own, in the page's light colors."""
    for variable, color in _LIGHT.items():
        svg = svg.replace(f"var(--{variable})", color)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + svg.replace("<svg ", '<svg font-family="sans-serif" ', 1)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean over the last ``window`` values."""
    sums, ends = np.cumsum([0.0, *values]), np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    means: list[float] = ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
    return means


def _bar(half: float) -> float | None:
    return half if math.isfinite(half) else None


def _label(axes: Axes, xlabel: str, ylabel: str, legend: bool) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if legend:
        # Under the axes: a legend inside hides data on one run and not on another.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)


def _size(large: bool, labels: int) -> tuple[float, float]:
    """Inches; a legend of many labels stands below and takes no height from the axes."""
    return (4.4, 3.0) if large and labels > 4 else (3.7, 2.4)


def _svg(draw: Callable[[Axes], None], name: str, label: str, width: float = 3.7, height: float = 2.4) -> str:
    """Draw into a fresh figure; ``name`` makes the ids of the page's drawings distinct, and the output repeatable."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    return _embed(buffer.getvalue(), name, label)


def _embed(svg: str, name: str, label: str) -> str:
    """Make a standalone SVG file part of a page: no prolog, ids of its own, the page's colors and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id|xlink:href)="(#?)([^"]+)"', rf'\1="\2{name}-\3"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(label)}">{body}'
