"""Processes that compute beside a measurement, and what the plan makes of how they slow each other down."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_t2i.errors import RunError
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning import plan
from rlhf_t2i.tools.planning.crowd import companions
from rlhf_t2i.tools.planning.speed import Measured, Passes
from tests.limits import HANG_S

MakeRecipe = Callable[..., Recipe]
ROLES = "roles: [learner, generator, assistant, reference, reward]"


def counting(file: str) -> Callable[[], None]:
    """Writes one byte per call."""

    def run() -> None:
        with Path(file).open("ab") as stream:
            stream.write(b".")

    return run


def failing() -> Callable[[], None]:
    raise ValueError("no such network")


def test_companions_compute_until_the_measurement_ends(tmp_path: Path) -> None:
    file = tmp_path / "calls"
    with companions(1, 1, counting, str(file)):
        before, deadline = file.stat().st_size, time.monotonic() + HANG_S
        assert before  # the first call was made before the measurement began
        while file.stat().st_size <= before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert file.stat().st_size > before
    ended = file.stat().st_size
    time.sleep(0.1)
    assert file.stat().st_size == ended


def test_a_companion_that_fails_ends_the_measurement(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="beside the measurement ended"), companions(1, 1, failing):
        raise AssertionError("must not be reached")
    assert "no such network" in capfd.readouterr().err


def test_processes_that_share_the_cores_are_planned_slower(make_recipe: MakeRecipe) -> None:
    """All of a group compute at once; of two groups only while both have work."""
    image = dict.fromkeys(("network", "decoder", "reward:pickscore"), Passes(1.0, 1.0, 1.0))
    alone, crowded = Measured(image), Measured(image, processes=2, crowded=1.5)

    def seconds(groups: str, speed: Measured) -> float:
        recipe = make_recipe(placement=f"{{mode: ray, groups: {{{groups}}}}}")
        return plan.step_time(recipe, speed).step

    replicas = f"all: {{{ROLES}, devices: 2}}"
    assert seconds(replicas, crowded) == pytest.approx(1.5 * seconds(replicas, alone))
    one = f"all: {{{ROLES}}}"
    assert seconds(one, crowded) == seconds(one, alone)
    apart = "train: {roles: [learner, generator, reference]}, serve: {roles: [assistant, reward]}"
    assert seconds(apart, alone) < seconds(apart, crowded) < 1.5 * seconds(apart, alone)
