"""Experiment trackers: what they record, what a missing package says, and what a failing one does to a run."""

from __future__ import annotations

import importlib.machinery
import json
import sqlite3
import sys
import types
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

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
        self.error: BaseException = ConnectionError("the network is down\nat some length")

    def init(self, **options: Any) -> FakeWandb:
        return self._call("init", options)

    def log(self, values: dict[str, float], step: int) -> None:
        self._call("log", (step, values))

    class Image:
        def __init__(self, pixels: Any) -> None:
            self.shape = pixels.shape

    class Table:
        def __init__(self, columns: list[str], data: list[list[Any]], dataframe: None) -> None:
            self.columns, self.data = columns, data

    def finish(self) -> None:
        self._call("finish", None)

    def _call(self, name: str, value: Any) -> FakeWandb:
        self.calls.append((name, value))
        if name == self.failing:
            raise self.error
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


def picture(folder: Path) -> Path:
    Image.new("RGB", (6, 4), "red").save(folder / "grid.png")
    return folder / "grid.png"


COLUMNS, CELLS = ["measure", "before"], [["pick|score", 0.25], ["judge", 1 / 3]]


def test_a_tracker_named_twice_is_refused() -> None:
    with pytest.raises(UsageError, match=r"logging\.trackers names tensorboard twice"):
        trackers.check(["tensorboard", "tensorboard"])


def test_tensorboard_shows_images_and_tables(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opened = trackers.Trackers(["tensorboard"], tmp_path, no_warning)
    opened.log_image("samples", picture(tmp_path), 2)
    opened.log_table("before_after", COLUMNS, CELLS, 5)
    opened.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (2, 6, 4)
    (table,) = events.Tensors("before_after/text_summary")
    text = table.tensor_proto.string_val[0].decode()
    assert text.splitlines()[0] == "| measure | before |"
    assert text.splitlines()[-1] == "| judge | 0.33333 |"


def test_wandb_gets_images_and_tables(tmp_path: Path, wandb: FakeWandb) -> None:
    opened = trackers.Trackers(["wandb"], tmp_path, no_warning)
    opened.log_image("samples", picture(tmp_path), 2)
    opened.log_table("before_after", COLUMNS, CELLS, 5)
    (_, (step, images)), (_, (later, tables)) = wandb.calls[1:]
    assert (step, [image.shape for image in images["samples"]]) == (2, [(4, 6, 3)])
    assert (later, tables["before_after"].columns, tables["before_after"].data) == (5, COLUMNS, CELLS)


@pytest.mark.slow
def test_mlflow_stores_images_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the mlflow extra")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    _log_all("mlflow", tmp_path)
    (image,) = (tmp_path / "mlflow").rglob("grid.png")
    assert image.read_bytes() == picture(tmp_path).read_bytes()
    (table,) = (tmp_path / "mlflow").rglob("before_after.json")
    stored = json.loads(table.read_text("utf-8"))
    assert stored["columns"] == COLUMNS
    assert stored["data"] == [[name, pytest.approx(value)] for name, value in CELLS]  # MLflow rounds to 10 digits


@pytest.mark.slow
def test_trackio_stores_images_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="the trackio extra")
    _log_all("trackio", tmp_path)
    (image,) = (tmp_path / "trackio").rglob("*.png")
    with Image.open(image) as stored:
        assert stored.size == (6, 4)
    with closing(sqlite3.connect(tmp_path / "trackio/rlhf-t2i.db")) as database:
        rows = {step: json.loads(row) for step, row in database.execute("select step, metrics from metrics")}
    assert rows[3]["reward/pickscore"] == 0.25
    assert rows[5]["before_after"]["_value"] == [dict(zip(COLUMNS, row, strict=True)) for row in CELLS]


def _log_all(name: str, out: Path) -> None:
    opened = trackers.Trackers([name], out, no_warning)
    opened.log(3, ROW)
    opened.log_image("samples", picture(out), 4)
    opened.log_table("before_after", COLUMNS, CELLS, 5)
    opened.close()


@pytest.mark.parametrize("error", [SystemExit(3), RuntimeError("")], ids=["exit", "error"])
def test_a_tracker_that_fails_at_every_call_is_one_warning(
    tmp_path: Path, wandb: FakeWandb, error: BaseException
) -> None:
    calls: dict[str, Callable[[trackers.Trackers], None]] = {
        "init": lambda opened: None,
        "log": lambda opened: opened.log_image("samples", picture(tmp_path), 1),
        "finish": lambda opened: opened.close(),
    }
    for failing, call in calls.items():
        warnings = list[str]()
        wandb.failing, wandb.error = failing, error
        opened = trackers.Trackers(["wandb"], tmp_path, warnings.append)
        call(opened)
        opened.log(1, ROW)
        opened.log_table("before_after", COLUMNS, CELLS, 1)
        opened.close()
        assert len(warnings) == 1
        assert warnings[0].startswith("wandb failed and is not used any more (")


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
