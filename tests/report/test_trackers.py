"""Experiment trackers: what they record, what a missing package says, and what a failing one does to a run."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import run, trackers
from rlhf_t2i.training.callbacks import TrainCallback

ROW = {"step": 3, "reward/pickscore": 0.25, "timing": {"step": 2.0, "busy": {"a/0": 1.0}}, "nan": float("nan"),
       "text": "x", "flag": True}  # fmt: skip


class FakeWandb(types.ModuleType):
    """Records calls; ``failing`` names the method that raises."""

    def __init__(self, failing: str = "") -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.failing, self.calls = failing, list[tuple[str, Any]]()

    def init(self, **options: Any) -> FakeWandb:
        return self._call("init", options)

    def log(self, values: dict[str, float], step: int) -> None:
        self._call("log", (step, values))

    def finish(self) -> None:
        self._call("finish", None)

    def _call(self, name: str, value: Any) -> FakeWandb:
        self.calls.append((name, value))
        if name == self.failing:
            raise ConnectionError("the network is down\nat some length")
        return self


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def no_warning(text: str) -> None:
    raise AssertionError(text)


def test_scalars_are_flat_finite_numbers() -> None:
    assert dict(trackers.scalars(ROW)) == {
        "step": 3.0, "reward/pickscore": 0.25, "timing/step": 2.0, "timing/busy/a/0": 1.0,
    }  # fmt: skip


def test_tensorboard_holds_the_values(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opened = trackers.Trackers(["tensorboard"], tmp_path, no_warning)
    opened.log(3, ROW)
    opened.log(4, {"reward/pickscore": 0.5})
    opened.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward/pickscore")
    assert [(event.step, event.value) for event in events] == [(3, 0.25), (4, 0.5)]


def test_wandb_is_offline_and_continues_the_same_run(tmp_path: Path, wandb: FakeWandb) -> None:
    for _ in range(2):
        opened = trackers.Trackers(["wandb"], tmp_path, no_warning)
        opened.log(3, ROW)
        opened.close()
    options = [value for name, value in wandb.calls if name == "init"]
    assert options[0]["mode"] == "offline"
    assert options[0]["id"] == options[1]["id"]
    logged = (3, {"reward/pickscore": 0.25, "timing/step": 2.0, "timing/busy/a/0": 1.0})
    assert wandb.calls[1:3] == [("log", logged), ("finish", None)]


def test_a_missing_package_is_refused_before_anything_is_written(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"wandb is not installed: pip install 'rlhf-t2i\[wandb\]'"):
        run.run(make_recipe(logging__trackers="[wandb]"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning(
    make_recipe: Callable[..., Recipe], tmp_path: Path, wandb: FakeWandb, failing: str
) -> None:
    class Messages(TrainCallback):
        heard: list[str] = []  # noqa: RUF012

        def on_message(self, text: str) -> None:
            self.heard.append(text)

    wandb.failing, Messages.heard = failing, []
    run.run(make_recipe(steps=2, logging__trackers="[wandb]"), tmp_path / "out", callback=Messages())
    warnings = [text for text in Messages.heard if "wandb" in text]
    assert warnings == ["wandb failed and is not used any more (the network is down); metrics.jsonl is complete"]
    assert [name for name, _ in wandb.calls].count(failing) == 1
    rows = (tmp_path / "out/metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]
