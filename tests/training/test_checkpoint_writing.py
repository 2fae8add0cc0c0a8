"""Checkpoints are written by threads while training goes on."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_t2i.engines.writer import Writer
from rlhf_t2i.errors import RunError
from rlhf_t2i.recipe.schema import Checkpoints, Recipe
from rlhf_t2i.training import checkpoints, run
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.state import TrainState
from tests.limits import HANG_S
from tests.training.test_checkpoint import Written, save


class Slow(Written):
    """Roles that write until they are told to stop, and then perhaps fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.stop, self.error = threading.Event(), error

    def finish_saving(self, role: str) -> None:
        assert self.stop.wait(HANG_S)
        if self.error is not None:
            raise self.error


def test_training_goes_on_while_a_checkpoint_is_written_which_is_absent_until_it_is_whole(tmp_path: Path) -> None:
    cluster, state = Slow(), TrainState(1)
    writing = checkpoints.begin(cluster, tmp_path, state, Checkpoints())  # type: ignore[arg-type]
    state.step = 2  # the next step is done
    assert writing.check() is None
    assert checkpoints.find(tmp_path)[0] is None
    cluster.stop.set()
    assert writing.wait().name == "step_000001"
    assert checkpoints.find(tmp_path)[1] == TrainState(1)
    seconds = writing.check()
    assert seconds is not None
    assert seconds > 0


def test_a_writer_that_fails_is_reported_and_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1, None, Checkpoints(keep=1))
    cluster = Slow(RunError("the learner failed"))
    writing = checkpoints.begin(cluster, tmp_path, TrainState(2), Checkpoints(keep=1))  # type: ignore[arg-type]
    cluster.stop.set()
    for _ in range(2):
        with pytest.raises(RunError, match="the learner failed"):
            writing.wait()
    with pytest.raises(RunError, match="the learner failed"):
        writing.check()
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_what_a_thread_writes_is_what_was_there_when_training_went_on(tmp_path: Path) -> None:
    writer, held, written = Writer(), threading.Event(), list[Any]()
    weights, options = torch.zeros(3), {"lr": 1.0}
    writer.write({"weights": [weights], "options": options}, lambda copied: (held.wait(HANG_S), written.append(copied)))
    weights.add_(1)
    options["lr"] = 2.0
    held.set()
    writer.wait()
    assert written[0]["options"] == {"lr": 1.0}
    assert torch.equal(written[0]["weights"][0], torch.zeros(3))
    address = written[0]["weights"][0].data_ptr()
    writer.write(weights, written.append)
    writer.wait()
    assert torch.equal(written[1], weights)
    assert written[1].data_ptr() == address  # the memory of the last checkpoint


def test_an_error_in_the_thread_is_raised_once_and_the_rest_is_not_written() -> None:
    writer, written = Writer(), list[Any]()

    def fail(_: object) -> None:
        raise OSError(28, "No space left on device")

    writer.write(1, fail)
    writer.write(2, written.append)
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    assert written == []
    writer.write(3, written.append)
    writer.wait()
    assert written == [3]


class Remove(TrainCallback):
    """Removes the run's folder after its first step, as a tidy colleague does."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        shutil.rmtree(self.out)


def test_a_folder_that_is_removed_meanwhile_is_one_sentence(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(evaluation__images=2, logging__sample_count=2)
    with pytest.raises(RunError, match=rf"{tmp_path}/out/\S+ could not be written: No such file or directory"):
        run.run(recipe, tmp_path / "out", callback=Remove(tmp_path / "out"))
