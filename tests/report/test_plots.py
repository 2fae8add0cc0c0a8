"""What a drawing of many rows says, and that it is the same whatever matplotlib's settings are."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from rlhf_t2i.tools.report import plots
from tests.limits import HANG_S


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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text.usetex", True), ("font.size", 40.0), ("path.sketch", (1.0, 100.0, 2.0)), ("lines.linewidth", 30.0),
        ("axes.facecolor", "red"), ("savefig.dpi", 999.0), ("svg.fonttype", "path"), ("axes.unicode_minus", False),
        ("figure.subplot.left", 0.9), ("axes.xmargin", 5.0), ("savefig.bbox", "tight"),
        ("axes.formatter.use_locale", True),
    ],
)  # fmt: skip
def test_settings_of_the_user_or_the_working_folder_change_nothing(key: str, value: Any) -> None:
    """matplotlib reads ./matplotlibrc; text.usetex ended the report of a trained run for want of LaTeX."""
    line = ([0.0, 1.0], [-1.0, 1000.0])
    expected = plots.curves({"a": line}, "x", "y", "name")
    with mpl.rc_context({key: value}):
        assert plots.curves({"a": line}, "x", "y", "name") == expected
        assert mpl.rcParams[key] == value


def test_settings_that_matplotlib_cannot_read_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_bytes("font.family: caf\xe9\n".encode("latin-1"))
    code = "from rlhf_t2i.tools.report import plots\nplots.curves({'a': ([0.0], [1.0])}, 'x', 'y', 'name')"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S
    )
    (last,) = done.stderr.splitlines()[-1:]
    assert last.startswith("rlhf_t2i.errors.RunError: matplotlib cannot be imported ('utf-8' codec can't decode")
    assert last.endswith(f"is there a damaged matplotlibrc in {tmp_path}?")
