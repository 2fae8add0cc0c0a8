"""Collectives between the processes of this machine, timed for ``plan --device here``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from rlhf_t2i.errors import RunError
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning import calibration, exchange
from rlhf_t2i.tools.planning.speed import Links, Measured, Passes

MakeRecipe = Callable[..., Recipe]
ROLES = "roles: [learner, generator, assistant, reference, reward]"
MEASURED = Measured(dict.fromkeys(("network", "decoder", "reward:pickscore"), Passes(1.0, 1.0, 1.0)))


def test_an_all_reduce_of_two_processes_is_timed() -> None:
    links = exchange.measure(2, 1, 1_000_000)
    assert links.node is not None
    assert 1e6 < links.node < 1e12
    assert 0 < links.start < 1


def test_a_process_that_ends_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="timed the collectives of this machine ended"):
        exchange.measure(2, 1, -1)
    assert "RuntimeError" in capfd.readouterr().err


@pytest.mark.parametrize(("devices", "timed"), [(1, []), (2, [2])])
def test_ranks_that_train_together_time_their_collectives(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, devices: int, timed: list[int]
) -> None:
    asked: list[int] = []

    def measure(ranks: int, threads: int, numbers: int) -> Links:
        asked.append(ranks)
        assert threads == 1
        assert numbers > 0
        return Links(1e9, start=1e-3)

    monkeypatch.setattr(exchange, "measure", measure)
    monkeypatch.setattr(calibration, "_measure", lambda *_: replace(MEASURED))
    monkeypatch.setattr(calibration, "_image", lambda *_: MEASURED.image)
    groups = f"{{all: {{{ROLES}, devices: {devices}, threads: 1}}}}"
    found = calibration.measure(make_recipe(placement=f"{{mode: ray, groups: {groups}}}"), 2)
    assert asked == timed
    assert (found.links.node is not None) == bool(timed)
