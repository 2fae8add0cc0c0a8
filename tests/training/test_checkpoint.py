"""Which checkpoints are kept, without training anything."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_t2i.engines.writer import Writer
from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.evaluation import models
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Checkpoints, Recipe
from rlhf_t2i.training import checkpoints, run
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.state import TrainState
from rlhf_t2i.utils import files, fingerprints, manifest
from tests import tiny


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


def test_any_flipped_bit_in_any_file_is_named(tmp_path: Path) -> None:
    """All bits of all files but large ones; those go through the same digest."""
    state = TrainState(2, 1, 5, [{"loss": 0.5, "grad_norm": float("inf")}], 1, {"generator": 1}, [0.25])
    folder = checkpoints.begin(Written(), tmp_path, state, Checkpoints()).wait()  # type: ignore[arg-type]
    accepted = []
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        whole = file.read_bytes()
        for bit in range(8 * len(whole)):
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            if manifest.damage(folder) != f"{file.relative_to(folder)} has changed":
                accepted.append((file.name, bit))
        file.write_bytes(whole[:-1])
        assert manifest.damage(folder) == f"{file.relative_to(folder)} has changed"
        file.write_bytes(whole)
    assert accepted == []
    assert checkpoints.find(tmp_path) == (folder, state, [])


class Slow(Written):
    """Roles that write until they are told to stop, and then perhaps fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.stop, self.error = threading.Event(), error

    def finish_saving(self, role: str) -> None:
        assert self.stop.wait(300.0)
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
    writer.write({"weights": [weights], "options": options}, lambda copied: (held.wait(300.0), written.append(copied)))
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path, tiny_prompts: Path) -> Path:
    """A run of one step; whoever damages it mends it."""
    folder = tmp_path_factory.mktemp("trained")
    data = tiny.recipe_dict(tiny_sdxl, tiny_prompts, steps=1, evaluation={"images": 2}, logging={"sample_count": 2})
    (folder / "recipe.yaml").write_text(json.dumps(data), "utf-8")
    run.run(reading.load(folder / "recipe.yaml"), folder / "out")
    return folder / "out"


def test_a_flipped_bit_in_weights_and_states_is_named(trained: Path) -> None:
    """A sample of the bits of all files, each file with its share: most are those of the large ones."""
    draw, accepted = random.Random(0), []
    for folder in (trained / "checkpoints/step_000001", trained / "model"):
        listed = {folder / name: entry["bytes"] for name, entry in manifest.read(folder)["files"].items()}
        assert listed.keys() == {file for file in folder.rglob("*") if file.is_file()} - {folder / manifest.NAME}
        for file in draw.choices(list(listed), list(listed.values()), k=100):
            position, bit = draw.randrange(listed[file]), 1 << draw.randrange(8)
            with flipped(file, position, bit):
                if manifest.damage(folder, fingerprints.of_file) != f"{file.relative_to(folder)} has changed":
                    accepted.append((file.name, position, bit))
        assert manifest.damage(folder) is None
    assert accepted == []


@contextlib.contextmanager
def flipped(file: Path, position: int, bit: int) -> Iterator[None]:
    """A file of which one bit is flipped in the block."""

    def flip() -> None:
        with file.open("r+b") as opened:
            opened.seek(position)
            (byte,) = opened.read(1)
            opened.seek(position)
            opened.write(bytes([byte ^ bit]))

    flip()
    try:
        yield
    finally:
        flip()


def test_a_damaged_model_is_refused_wherever_it_is_read(trained: Path, make_recipe: Callable[..., Recipe]) -> None:
    model, weights = trained / "model", "unet/diffusion_pytorch_model.safetensors"
    sentence = f"model: {weights} has changed, says its manifest.json: take a whole copy, or remove that file"
    recipes = [
        make_recipe(models__generator=str(model / "unet")),
        make_recipe(models__reference=str(model)),
        make_recipe(models__vae=str(model / "vae")),
    ]
    with flipped(model / weights, 5000, 4):
        for read in [
            *[partial(run.run, recipe, trained.parent / "other") for recipe in recipes],
            partial(models.load, str(trained)),
        ]:
            with pytest.raises(UsageError, match=re.escape(sentence)):
                read()
    assert not (trained.parent / "other").exists()
    models.load(str(trained))
    (model / weights).rename(model / "away")
    try:
        with pytest.raises(UsageError, match=r"safetensors is missing, says its manifest\.json"):
            models.load(str(trained))
    finally:
        (model / "away").rename(model / weights)


def test_an_export_without_its_steps_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    """Its pipeline would be asked for 50 steps, and its scheduler has one."""
    model = Path(shutil.copytree(trained / "model", tmp_path / "model"))
    (model / "student.json").unlink()
    with pytest.raises(UsageError, match=r"student\.json is missing, says its manifest\.json"):
        models.load(str(model))
    (model / "manifest.json").unlink()
    with pytest.raises(
        UsageError, match=r"does not draw in 50 steps .* put its student\.json beside model_index\.json"
    ):
        models.load(str(model)).sample("a cat")


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1}, {"step": 2.0}, {"step": True}, {"round": None}, {"rewards": [float("nan")]}, {"rewards": {}},
        {"reports": [1]}, {"reports": [{"loss": "x"}]}, {"bad_in_a_row": {"generator": -1}}, {"more": 1},
    ],
)  # fmt: skip
def test_a_state_that_no_run_has_is_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    """Also under a manifest that is whole: a value of another kind must not be found out steps later."""
    save(tmp_path, 1, None, Checkpoints())
    folder = tmp_path / "checkpoints/step_000001"
    content = manifest.read(folder)
    (folder / "manifest.json").write_text(manifest.render(content | {"state": content["state"] | change}), "utf-8")
    with pytest.raises(UsageError, match="step_000001 is damaged"):
        checkpoints.find(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"files": {}}', "[" * 100_000])
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, content: str) -> None:
    save(tmp_path, 1, None, Checkpoints())
    (tmp_path / "checkpoints/step_000001/manifest.json").write_text(content, "utf-8")
    with pytest.raises(UsageError, match=r"step_000001 is damaged \(manifest\.json has changed\)"):
        checkpoints.find(tmp_path)


def test_a_checkpoint_under_another_ones_name_is_damage(tmp_path: Path) -> None:
    save(tmp_path, 1, None, Checkpoints())
    (tmp_path / "checkpoints/step_000001").rename(tmp_path / "checkpoints/step_000007")
    with pytest.raises(UsageError, match=r"step_000007 is damaged \(it holds step_000001\)"):
        checkpoints.find(tmp_path)


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
