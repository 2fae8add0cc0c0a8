"""Optional writers: what they record, and what a missing extra says."""

from __future__ import annotations

import sys
import types

import pytest

from rlhf_t2i.errors import UsageError
from rlhf_t2i.training import trackers

ROW = {"step": 3, "reward/pickscore": 0.25, "timing": {"step": 2.0, "busy": {"a/0": 1.0}}, "nan": float("nan"),
       "text": "x", "flag": True}  # fmt: skip


def test_scalars_are_flat_finite_numbers():
    assert dict(trackers.scalars(ROW)) == {
        "step": 3.0, "reward/pickscore": 0.25, "timing/step": 2.0, "timing/busy/a/0": 1.0,
    }  # fmt: skip


def test_tensorboard_holds_the_values(tmp_path):
    pytest.importorskip("tensorboard", reason="the tensorboard extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (writer,) = trackers.open_writers(["tensorboard"], tmp_path)
    writer.log(3, ROW)
    writer.log(4, {"reward/pickscore": 0.5})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward/pickscore")
    assert [(event.step, event.value) for event in events] == [(3, 0.25), (4, 0.5)]


def test_wandb_is_offline_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    calls, logged = [], []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or Run())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for _ in range(2):
        (writer,) = trackers.open_writers(["wandb"], tmp_path)
        writer.log(3, {"reward/pickscore": 0.25})
        writer.close()
    assert calls[0]["mode"] == "offline"
    assert calls[0]["id"] == calls[1]["id"]
    assert logged[:2] == [(3, {"reward/pickscore": 0.25}), "finished"]


def test_a_missing_extra_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"pip install 'rlhf-t2i\[wandb\]'"):
        trackers.open_writers(["wandb"], tmp_path)
    with pytest.raises(UsageError, match="unknown writer 'mlflow'"):
        trackers.open_writers(["mlflow"], tmp_path)
    assert trackers.open_writers([], tmp_path) == []
