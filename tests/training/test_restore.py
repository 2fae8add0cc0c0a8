"""Lost processes: the run restores itself and continues to the same numbers; a stuck one is named."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from rlhf_t2i.cluster import base as starting
from rlhf_t2i.cluster import clients, ray_cluster
from rlhf_t2i.cluster.ray_cluster import RayCluster
from rlhf_t2i.errors import ProcessLost, RunError, Stopped
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.training import run
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.state import TrainState
from tests.limits import HANG_S
from tests.training.test_run import StopAt, metrics, model_bytes

pytestmark = [pytest.mark.ray, pytest.mark.slow]
MakeRecipe = Callable[..., Recipe]
GROUPS = (
    "{train: {roles: [learner], threads: 1}, draw: {roles: [generator], threads: 1}, "
    "model: {roles: [assistant, reference], threads: 1}, score: {roles: [reward], threads: 1}}"
)


class Killer(TrainCallback):
    """Sends SIGKILL to the first process of a group after a step, once for each entry of ``plan``.

    Before, the last checkpoint that is due in ``out`` becomes whole: a disk may be slower than a step.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path, every: int, plan: dict[int, str]) -> None:
        self.out, self.every = out, every
        self.plan, self.notes = dict(plan), list[str]()
        self.cluster: Any = None
        original = starting.start

        def start(*args: Any) -> Any:
            self.cluster = original(*args)
            return self.cluster

        monkeypatch.setattr(starting, "start", start)

    def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        group = self.plan.pop(state.step, None)
        if group is not None:
            due = (state.step - 1) // self.every * self.every
            while due and not (self.out / f"checkpoints/step_{due:06d}").exists():
                time.sleep(0.01)
            actor = self.cluster._actors[group][0]
            os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)

    def on_message(self, text: str) -> None:
        self.notes.append(text)


def test_a_run_survives_the_loss_of_every_role_bit_for_bit(
    ray_instance: None, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(
        placement="{mode: ray, groups: " + GROUPS + "}", steps=6, checkpoints__every=2, algorithm__assistant_steps=2
    )
    run.run(recipe, tmp_path / "whole")
    killer = Killer(monkeypatch, tmp_path / "killed", 2, {1: "draw", 2: "score", 3: "train", 5: "model"})
    run.run(recipe, tmp_path / "killed", callback=killer)
    assert model_bytes(tmp_path / "killed") == model_bytes(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    restarts = [note for note in killer.notes if "restart" in note]
    assert ["step_000002" in restarts[0], "step_000004" in restarts[1], len(restarts)] == [True, True, 2]
    assert "learner" in restarts[0]


def test_a_run_that_keeps_losing_processes_ends(
    ray_instance: None, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = "{all: {roles: [learner, generator, assistant, reference, reward], threads: 1}}"
    recipe = make_recipe(placement="{mode: ray, max_restarts: 0, groups: " + groups + "}", checkpoints__every=1)
    killer = Killer(monkeypatch, tmp_path / "out", 1, {2: "all"})
    with pytest.raises(RunError, match=r"a process of the .* died.*placement\.max_restarts"):
        run.run(recipe, tmp_path / "out", callback=killer)
    saved = list((tmp_path / "out/checkpoints").iterdir())
    assert [folder.name for folder in saved] == ["step_000001"]
    run.run(recipe, tmp_path / "out", resume=True)


def test_a_process_lost_while_starting_again_is_one_more_restart(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, original = make_recipe(checkpoints__every=1), starting.start
    run.run(recipe, tmp_path / "whole")
    fates = iter(["lost in its second step", "lost at once", "well"])

    def start(*args: Any) -> Any:
        fate = next(fates)
        if fate == "lost at once":
            raise ProcessLost("a process of group 'all' died")
        cluster = original(*args)
        if fate == "lost in its second step":
            answers = iter([cluster.readings] * 3)  # before the first step, of it, and after its checkpoint
            monkeypatch.setattr(cluster, "readings", lambda: next(answers, lost)())
        return cluster

    def lost() -> Any:
        raise ProcessLost("a process of the learner died")

    monkeypatch.setattr(starting, "start", start)
    killer = Killer(monkeypatch, tmp_path / "killed", 1, {})
    run.run(recipe, tmp_path / "killed", callback=killer)
    restarts = [note for note in killer.notes if "restart" in note]
    assert ["learner" in restarts[0], "'all'" in restarts[1], len(restarts)] == [True, True, 2]
    assert all("step_000001" in note for note in restarts)
    assert model_bytes(tmp_path / "killed") == model_bytes(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


LOST_WHILE_LOADING = """
import os, signal
from pathlib import Path
from rlhf_t2i.plugins import Reward

class Lost(Reward):
    \"""Its first process is killed while it loads its roles.\"""

    def __init__(self, options=None):
        super().__init__(options)
        once = Path({once!r})
        if "RLHF_T2I_PROCESS" in os.environ and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def score(self, images, prompts):
        return images.mean((1, 2, 3))
"""


def test_a_learner_killed_during_the_first_start_is_restarted(
    ray_instance: None, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, once = tmp_path / "lost.py", tmp_path / "once"
    plugin.write_text(LOST_WHILE_LOADING.format(once=str(once)), "utf-8")
    groups = "{all: {roles: [learner, generator, assistant, reference, reward], threads: 1}}"
    recipe = make_recipe(
        placement="{mode: ray, groups: " + groups + "}", steps=1, algorithm__rewards=f"[{{name: '{plugin}:Lost'}}]"
    )
    killer = Killer(monkeypatch, tmp_path / "out", 1, {})
    run.run(recipe, tmp_path / "out", callback=killer)
    assert once.exists()
    (restart,) = [note for note in killer.notes if "restart" in note]
    assert "starting again from the beginning (restart 1 of 3)" in restart
    assert (tmp_path / "out/model").is_dir()


def test_a_start_that_always_loses_a_process_ends(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*args: Any) -> Any:
        raise ProcessLost("a process of group 'all' died")

    monkeypatch.setattr(starting, "start", start)
    with pytest.raises(RunError, match=r"restored 3 times already \(placement.max_restarts\)"):
        run.run(make_recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()  # nothing was begun


@pytest.mark.parametrize(("zero", "devices"), [(1, 1), (2, 2), (3, 2)])
def test_resume_over_ray_is_bit_identical(
    ray_instance: None,
    make_recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    zero: int,
    devices: int,
) -> None:
    groups = f"{{all: {{devices: {devices}, threads: 1, roles: [learner, generator, assistant, reference, reward]}}}}"
    recipe = make_recipe(
        placement="{mode: ray, groups: " + groups + "}",
        optimization__zero_stage=zero,
        optimization__micro_batch=1,  # accumulates
        optimization__ema="{half_life_kimg: 0.01}",
        algorithm__assistant_steps=2,
        checkpoints__every=1,
        steps=2,
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run.run(recipe, whole)
    if devices == 1:
        with monkeypatch.context() as patch:
            callback = StopAt(patch, 1, 1)  # in the middle of a cycle
            with pytest.raises(Stopped):
                run.run(recipe, broken, callback=callback)
    else:  # as a kill in the second step leaves it
        shutil.copytree(whole, broken)
        for name in ("model", "evaluation/after", "checkpoints/step_000002"):
            shutil.rmtree(broken / name)
    run.run(recipe, broken, resume=True)
    assert model_bytes(broken) == model_bytes(whole)
    assert metrics(broken) == metrics(whole)
    for state in sorted((whole / "checkpoints/step_000002").rglob("*.pt")):
        other = broken / state.relative_to(whole)
        assert_equal_states(torch.load(state, weights_only=False), torch.load(other, weights_only=False))


def assert_equal_states(one: Any, other: Any) -> None:
    """Optimizer states, weights and averages, whatever DeepSpeed nests them in."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal_states(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal_states(a, b)


STUCK = """
import time
from rlhf_t2i.plugins import Reward

class Stuck(Reward):
    def score(self, images, prompts):
        time.sleep(3600)
"""


def test_a_stuck_process_is_named(
    ray_instance: None, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the limit stands still until the processes are where they hang."""
    plugin = tmp_path / "stuck.py"
    plugin.write_text(STUCK, "utf-8")
    groups = "{train: {roles: [learner, generator, assistant, reference], threads: 1}, score: {roles: [reward]}}"
    recipe = make_recipe(
        placement="{mode: ray, step_timeout_s: 30, groups: " + groups + "}",
        algorithm__rewards=f"[{{name: '{plugin}:Stuck', label: stuck}}]",
    )
    cluster = RayCluster(recipe)

    def now() -> float:
        states = cluster._states(cluster._all_specs)
        hang = "waiting for another process" in states["train/0"] and "value_and_grad" in states["score/0"]
        return 3600.0 if hang else 0.0

    monkeypatch.setattr(clients, "time", SimpleNamespace(monotonic=now))
    monkeypatch.setattr(clients, "_CHECK_EVERY_S", 0.5)
    monkeypatch.setattr(ray_cluster, "_STATUS_TIMEOUT_S", HANG_S)
    try:
        with pytest.raises(RunError, match=r"learner did not answer within 30 s") as error:
            cluster.call_all("learner", LearnerRole.step, 0, ["a", "b", "c", "d"])
    finally:
        cluster.close()
    assert "train/0: learner.step for" in str(error.value)
    assert "waiting for another process" in str(error.value)
    assert "score/0: reward.value_and_grad for" in str(error.value)
