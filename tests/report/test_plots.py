"""What a drawing of many rows says: names in the margin, one color per row."""

from __future__ import annotations

import itertools
import re

from rlhf_t2i.tools.report import plots


def heights(svg: str) -> dict[str, float]:
    """Where each text stands, from the top."""
    found = re.findall(r'<text[^>]*?transform="translate\([\d.]+ ([\d.]+)\)[^>]*>([^<]+)</text>', svg)
    found += re.findall(r'<text[^>]*? y="([\d.]+)"[^>]*>([^<]+)</text>', svg)
    return {label: float(y) for y, label in found}


def test_names_in_the_margin_follow_their_points_and_keep_their_distance():
    crowded = {f"row {index}": (float(index % 3), index * 1e-3, 0.1, 0.1) for index in range(9)}
    groups = {"far below": (0.0, -5.0, 0.1, 0.1), **crowded}
    found = heights(plots.fronts(groups, {"front": ["row 0", "row 4", "row 8"]}, "x", "y", "t"))
    order = sorted(groups, key=lambda label: -found[label])
    assert order == list(groups)
    places = [found[label] for label in order]
    assert min(a - b for a, b in itertools.pairwise(places)) > 9  # font size 7 and some air


def test_a_row_has_one_color_in_all_drawings():
    order = ["initial", "first", "second"]
    line = ([0.0, 1.0], [0.0, 1.0])
    alone = plots.curves({"second": line}, "x", "y", "a", order=order)
    both = plots.curves({"first": line, "second": line}, "x", "y", "b", order=order)
    assert "--series-2" in alone
    assert "--series-0" not in alone + both
    assert "--series-1" in both
    assert "--series-2" in both
