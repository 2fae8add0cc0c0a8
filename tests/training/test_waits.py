"""How often the host waits for the device in a training step, counted on the pretended device (tests/pretended.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.worker import Worker
from rlhf_t2i.training import run
from tests import pretended
from tests.training.test_device import device  # noqa: F401

Counts = dict[tuple[str, int], Counter[str]]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """By role and number of the update: what the host waited for in it."""
    counts: Counts = {}
    call = Worker.call

    def counting(self: Worker, role: str, method: Any, *args: Any, **kwargs: Any) -> Any:
        before = len(pretended.WAITS)
        result = call(self, role, method, *args, **kwargs)
        if method.__name__ in ("train", "step"):
            counts[role, args[0]] = Counter(pretended.WAITS[before:])
        return result

    monkeypatch.setattr(Worker, "call", counting)
    return counts


def check(counted: Counts, micro_batches: int) -> None:
    """Two reads per update, its norm and its measurements, and one per micro-batch: whether its rewards are finite."""
    for update in (1, 2):  # the first one also fills caches
        assert counted["assistant", update].total() == 2, counted["assistant", update]
        assert counted["learner", update].total() == 2 + micro_batches, counted["learner", update]


@pytest.mark.parametrize(
    ("changes", "micro_batches"),
    [
        ({"optimization__micro_batch": 2}, 2),
        ({"algorithm__cfg__mode": "outer", "algorithm__divergence": "{name: kl}"}, 1),
    ],
    ids=["two micro-batches", "outer guidance and KL"],
)
def test_sdxl(
    device: None,  # noqa: F811
    counted: Counts,
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    changes: dict[str, Any],
    micro_batches: int,
) -> None:
    run.run(make_recipe(**changes), tmp_path / "out")
    check(counted, micro_batches)


def test_flow_matching_in_four_steps(
    device: None,  # noqa: F811
    counted: Counts,
    make_recipe: Callable[..., Recipe],
    tiny_sd3: Path,
    tmp_path: Path,
) -> None:
    models = f"{{reference: {tiny_sd3}, generator: {tiny_sd3}, height: 16, width: 16}}"
    run.run(make_recipe(models=models, student="{steps: 4}"), tmp_path / "out")
    check(counted, 1)
