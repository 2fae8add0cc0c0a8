"""docs/scaling.md says what the plan says, and the plots are drawn from it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_t2i.recipe import reading

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import scaling

        yield scaling


@pytest.fixture(scope="module")
def scaling(script: Any) -> Any:
    return script.Scaling(reading.load(ROOT / "recipes/di_star_pickscore.yaml"))


def rows_of_the_page() -> Iterator[tuple[int, int, int, float, float]]:
    """(GPUs, Gb/s, batch, seconds, images per second) of its tables of clusters."""
    for line in (ROOT / "docs/scaling.md").read_text("utf-8").splitlines():
        cells = [cell.strip().replace(",", "").rstrip("%") for cell in line.strip("|").split("|")]
        if len(cells) != 6 or not cells[0].isdigit():
            continue
        grows = cells[2].isdigit() and int(cells[2]) > 100
        batch, step, images = (int(cells[2]), *cells[3:5]) if grows else (128, *cells[2:4])
        yield int(cells[0]), 400 if cells[1] == "-" else int(cells[1]), batch, float(step), float(images)


def test_the_page_says_what_is_planned(scaling: Any) -> None:
    rows = list(rows_of_the_page())
    assert len(rows) == 10
    for gpus, network, batch, step, images in rows:
        row = scaling.row(gpus, network, batch)
        assert row.seconds.step == pytest.approx(step, rel=0.1), (gpus, network, batch)
        assert row.images == pytest.approx(images, rel=0.1)


def test_shares_of_a_step_add_up(script: Any, scaling: Any) -> None:
    rows = [scaling.row(8, 400, 128), scaling.row(64, 100, 128)]
    cells = [re.findall(r"(\d+)%", line) for line in script.shares(rows)][2:]
    for column in range(2):
        assert sum(int(line[column]) for line in cells) == pytest.approx(100, abs=4)
    page = (ROOT / "docs/scaling.md").read_text("utf-8")
    shown = dict(re.findall(r"^\| ([a-z ]+) \| (\d+)% \|", page, flags=re.MULTILINE))
    assert float(shown["decoder"]) == pytest.approx(
        100 * rows[0].seconds.roles("generator")["decoder"] / rows[0].seconds.step, abs=3
    )
    assert float(shown["exchanging gradients and weights"]) == pytest.approx(100 * rows[0].communicating, abs=2)


def test_groups_of_their_own_wait(scaling: Any) -> None:
    apart, together = (scaling.row(64, 400, 128, apart=apart) for apart in (True, False))
    assert apart.seconds.idle["score"] > 0.3
    assert together.seconds.idle["all"] == pytest.approx(0.0, abs=1e-9)
    assert apart.images < 0.9 * together.images


def test_plots_show_every_network(script: Any, scaling: Any) -> None:
    rows = scaling.rows(128)
    drawn = script.draw(rows, "test")
    assert drawn.startswith("<?xml")
    for name in ("ideal", "100 Gb/s", "400 Gb/s", "3,200 Gb/s"):
        assert name in drawn
    assert len(list(script.table(rows))) == 2 + 1 + 3 * 3
