"""Which checkpoints are kept, without training anything."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_t2i.recipe.schema import Checkpoints, Recipe
from rlhf_t2i.training import checkpoints, run
from rlhf_t2i.training.state import TrainState
from rlhf_t2i.utils import files, manifest


class Written:
    """A cluster of which every role writes one small file."""

    def call_all(self, role: str, method: Callable[..., Any], *args: Any) -> list[Any]:
        assert method.__name__ == "save"
        (Path(args[0]) / "state").write_text(role, "utf-8")
        return []

    def finish_saving(self, role: str) -> None:
        """It has."""


def save(out: Path, step: int, reward: float | None, policy: Checkpoints) -> None:
    checkpoints.begin(Written(), out, TrainState(step, rewards=[] if reward is None else [reward]), policy).wait()  # type: ignore[arg-type]


def present(out: Path) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in (out / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 5, 2, 3], [2, 3, 4]),
        ([1, 5, 5, 3, 4, 2], [3, 5, 6]),  # of equals the newest
        ([-5, -1, -2, -3], [2, 3, 4]),
        ([None, 1, float("nan"), 0.5], [2, 3, 4]),
        ([None, None, None], [2, 3]),  # a recipe without rewards
        ([1, 2, 3, 4], [3, 4]),  # the best is among the newest
    ],
)
def test_the_best_by_reward_is_kept_besides_the_newest(
    tmp_path: Path, rewards: list[float | None], expected: list[int]
) -> None:
    for step, reward in enumerate(rewards, 1):
        save(tmp_path, step, reward, Checkpoints(keep=2))
    assert present(tmp_path) == expected
    save(tmp_path, len(rewards) + 1, 0.0, Checkpoints(keep=1, keep_best=False))
    assert present(tmp_path) == [len(rewards) + 1]


def test_steps_are_ordered_as_numbers_and_rounds_within_them(tmp_path: Path) -> None:
    for step, count in ((999_999, 0), (1_000_000, 0), (1_000_000, 2), (1_000_000, 11)):
        checkpoints.begin(Written(), tmp_path, TrainState(step, count), Checkpoints(keep=4)).wait()  # type: ignore[arg-type]
    folder, progress, _ = checkpoints.find(tmp_path)
    assert (progress.step, progress.round) == (1_000_000, 11)
    assert folder is not None
    (folder / "learner/state").write_text("damaged", "utf-8")
    assert checkpoints.find(tmp_path)[1].round == 2


def test_a_damaged_newer_checkpoint_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, None, Checkpoints(keep=2))
    (tmp_path / "checkpoints/step_000002/learner/state").unlink()
    assert checkpoints.find(tmp_path)[1].step == 1
    checkpoints.begin(Written(), tmp_path, TrainState(1, 1), Checkpoints(keep=1)).wait()  # type: ignore[arg-type]
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_000001_round_001"]


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints/.writing-step_000007_round_003/learner"
    left.mkdir(parents=True)
    (left / "state").write_text("half", "utf-8")
    assert checkpoints.find(tmp_path) == (None, TrainState(), [])
    save(tmp_path, 8, None, Checkpoints())
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_000008"]


@pytest.mark.parametrize("moment", ["before it is moved", "between", "while the old one is removed"])
def test_a_kill_while_one_replaces_another_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """SIGTERM just after a regular checkpoint once removed it to write the same one again; SIGKILL came next."""
    save(tmp_path, 1, None, Checkpoints(keep=1))

    class Killed(BaseException):
        pass

    def killed(*args: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "while the old one is removed":
            # Half of it is gone.
            patch.setattr(files.shutil, "rmtree", lambda folder, **more: (Path(folder) / "learner/state").unlink())
        else:
            renamed, left = Path.rename, 0 if moment == "before it is moved" else 1

            def rename(path: Path, to: Path) -> Path:
                nonlocal left
                left -= 1
                return renamed(path, to) if left >= 0 else killed()

            patch.setattr(Path, "rename", rename)
            patch.setattr(files, "_why_not_written", killed)  # nor does anything that would tidy up
        with contextlib.suppress(Killed):
            save(tmp_path, 1, None, Checkpoints(keep=1))
    found, _, warnings = checkpoints.find(tmp_path)
    assert found == tmp_path / "checkpoints/step_000001"
    assert warnings == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux which file a descriptor is")
def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[str]()

    def named(path: Path) -> str:
        return str(path.relative_to(tmp_path)).replace(".writing-", "")

    synced, renamed = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(named(Path(f"/proc/self/fd/{fd}").resolve())) or synced(fd))
    monkeypatch.setattr(Path, "rename", lambda path, to: done.append("renamed") or renamed(path, to))
    save(tmp_path, 1, None, Checkpoints())
    before, after = done[: done.index("renamed")], done[done.index("renamed") + 1 :]
    folder = "checkpoints/step_000001"
    parts = ("", "/learner", "/learner/state", "/assistant", "/assistant/state", "/manifest.json")
    assert {".", *(folder + part for part in parts)} <= set(before)
    assert after == ["checkpoints"]


def test_a_copy_under_another_name_is_neither_read_nor_pruned(tmp_path: Path) -> None:
    save(tmp_path, 1, None, Checkpoints(keep=1))
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step_000001", folder / "step_000001_before_the_crash")
    shutil.copytree(folder / "step_000001", tmp_path / "elsewhere")
    (folder / "step_000000").symlink_to(tmp_path / "elsewhere")
    save(tmp_path, 2, None, Checkpoints(keep=1, keep_best=False))
    assert checkpoints.find(tmp_path)[1].step == 2
    assert sorted(path.name for path in folder.iterdir()) == ["step_000001_before_the_crash", "step_000002"]
    assert (tmp_path / "elsewhere/manifest.json").is_file()


def test_the_window_is_the_last_steps(tmp_path: Path) -> None:
    progress = TrainState()
    assert progress.mean_reward() is None
    for reward in (100.0, 1.0, float("inf"), None, 2.0):
        progress.add_reward(reward, window=2)
    assert progress.mean_reward() == 1.5


def test_a_run_keeps_its_best_through_a_resume_and_measures_saving(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = {"checkpoints__every": 1, "checkpoints__keep": 1}
    run.run(make_recipe(**options), out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert ["checkpoint" in row["timing"] for row in rows] == [False, True, True]
    assert all(row["timing"]["checkpoint"] > 0 for row in rows[1:])
    assert any("checkpoint_write" in row["timing"] for row in rows[1:])  # of one that is whole
    rewards = {row["step"]: 100 * row["reward/pickscore"] for row in rows}
    best = max(rewards, key=lambda step: rewards[step])
    assert present(out) == sorted({best, 3})
    kept = out / f"checkpoints/step_{best:06d}"
    content = manifest.read(kept)
    assert content["reward"] == pytest.approx(rewards[best])
    (kept / "manifest.json").write_text(manifest.render(content | {"reward": 1e9}), "utf-8")
    run.run(make_recipe(**options, steps=5), out, resume=True)
    assert present(out) == sorted({best, 5})
