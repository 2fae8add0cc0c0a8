"""Plots as inline SVG: drawn by matplotlib, colored by the page, so that light and dark share one drawing."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_t2i.errors import RunError, first_line

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


def curves(
    series: Series, xlabel: str, ylabel: str, name: str, large: bool = False, order: Sequence[str] = ()
) -> str:  # fmt: skip
    """Lines by label: the values faint, their running mean on top.

    Args:
        series: The lines.
        xlabel: Of the axis.
        ylabel: Of the axis.
        name: Of the drawing.
        large: Wider, for many lines.
        order: Labels of this and other drawings: a label has one color in all that are given the same order.
    """

    def draw(axes: Axes) -> None:
        for position, (label, (x, y)) in enumerate(series.items()):
            index = order.index(label) if label in order else position
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
    groups: Mapping[str, Point], xlabel: str, ylabel: str, name: str, arrows: Sequence[tuple[str, str]] = ()
) -> str:  # fmt: skip
    """Points with error bars and a legend; an arrow leads from the first to the second label of each pair."""

    def draw(axes: Axes) -> None:
        for index, (label, point) in enumerate(groups.items()):
            marker = "os^Dvp"[index // len(_SERIES) % 6]
            _point(axes, point, marker, _SERIES[index % len(_SERIES)], size=5, label=label)
        for start, end in arrows:
            axes.annotate(
                "", groups[end][:2], groups[start][:2],
                arrowprops={"arrowstyle": "->", "color": _INK, "shrinkA": 6, "shrinkB": 6, "alpha": 0.6},
            )  # fmt: skip
        axes.margins(0.15)
        axes.locator_params(axis="x", nbins=6)
        _label(axes, xlabel, ylabel, legend=True)

    return _svg(draw, name, f"{ylabel} against {xlabel}")


def fronts(
    groups: Mapping[str, Point], lines: Mapping[str, Sequence[str]], xlabel: str, ylabel: str, name: str
) -> str:  # fmt: skip
    """Many points, each named in the right margin, at its height where there is room.

    Args:
        groups: Points by label.
        lines: Labels that a line joins in this order, by the line's name: a color each. Other points are gray.
        xlabel: Of the axis.
        ylabel: Of the axis.
        name: Of the drawing.
    """
    colors = {label: _SERIES[index % len(_SERIES)] for index, front in enumerate(lines.values()) for label in front}

    def draw(axes: Axes) -> None:
        for front, labels in lines.items():
            xs, ys = zip(*(groups[label][:2] for label in labels), strict=True)
            axes.plot(xs, ys, color=colors[labels[0]], linewidth=1.2, label=front)
        for label, point in groups.items():
            _point(axes, point, "o", colors.get(label, _INK), size=4)
        axes.margins(0.08)
        axes.locator_params(axis="x", nbins=6)
        _name_in_margin(axes, groups, colors)
        _label(axes, xlabel, ylabel, legend=bool(lines))

    return _svg(draw, name, f"{ylabel} against {xlabel}", 4.0, max(3.0, 0.17 * len(groups)))


def _name_in_margin(axes: Axes, groups: Mapping[str, Point], colors: Mapping[str, str]) -> None:
    """Write labels right of the axes, in the order of their points' heights, each joined to its point."""
    low, high = axes.get_ylim()
    order = sorted(groups, key=lambda label: groups[label][1])
    wanted = np.array([(groups[label][1] - low) / (high - low) for label in order])
    gap = 1 / max(len(order), 12)
    steps = gap * np.arange(len(order))
    # The least that each must rise to keep its distance to those below; all sink where the topmost would leave.
    heights = np.maximum.accumulate(wanted - steps) + steps
    heights = np.minimum(heights, 1 - gap * np.arange(len(order))[::-1])
    for label, height in zip(order, heights, strict=True):
        axes.annotate(
            label, groups[label][:2], (1.04, height), xycoords="data", textcoords="axes fraction", va="center",
            fontsize=7, color=colors.get(label, _INK), annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": _FAINT, "linewidth": 0.6, "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip


def _point(axes: Axes, point: Point, marker: str, color: str, size: int, label: str | None = None) -> None:
    x, y, dx, dy = point
    axes.errorbar(
        x,
        y,
        xerr=_bar(dx),
        yerr=_bar(dy),
        fmt=marker,
        color=color,
        markersize=size,
        elinewidth=0.7,
        capsize=2,
        label=label,
    )


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
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except (ImportError, ValueError) as error:  # it reads ./matplotlibrc when it is imported
        raise RunError(
            f"matplotlib cannot be imported ({first_line(error)}): is there a damaged matplotlibrc in {Path.cwd()}?"
        ) from error
    with mpl.rc_context():
        mpl.rcdefaults()  # not the settings of the user or of the working folder: text.usetex asks for LaTeX
        mpl.rcParams.update(_STYLE | {"svg.hashsalt": name})
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
