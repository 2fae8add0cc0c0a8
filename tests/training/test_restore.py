"""Lost processes: the run restores itself and continues to the same numbers; a stuck one is named."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch

from rlhf_t2i.cluster import base as starting
from rlhf_t2i.cluster.ray_cluster import RayCluster
from rlhf_t2i.errors import ProcessLost, RunError, Stopped
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.training import run
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.state import TrainState
from tests.training.test_run import StopAt, metrics, model_bytes

pytestmark = [pytest.mark.ray, pytest.mark.slow]
MakeRecipe = Callable[..., Recipe]
GROUPS = (
    "{train: {roles: [learner], threads: 1}, draw: {roles: [generator], threads: 1}, "
    "model: {roles: [assistant, reference], threads: 1}, score: {roles: [reward], threads: 1}}"
)


class Killer(TrainCallback):
    """Sends SIGKILL to the first process of a group after a step, once for each entry of ``plan``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, plan: dict[int, str]) -> None:
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
    killer = Killer(monkeypatch, {1: "draw", 2: "score", 3: "train", 5: "model"})
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
    with pytest.raises(RunError, match=r"a process of the .* died.*placement\.max_restarts"):
        run.run(recipe, tmp_path / "out", callback=Killer(monkeypatch, {2: "all"}))
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
            answers = iter([cluster.readings])
            monkeypatch.setattr(cluster, "readings", lambda: next(answers, lost)())
        return cluster

    def lost() -> Any:
        raise ProcessLost("a process of the learner died")

    monkeypatch.setattr(starting, "start", start)
    killer = Killer(monkeypatch, {})
    run.run(recipe, tmp_path / "killed", callback=killer)
    restarts = [note for note in killer.notes if "restart" in note]
    assert ["learner" in restarts[0], "'all'" in restarts[1], len(restarts)] == [True, True, 2]
    assert all("step_000001" in note for note in restarts)
    assert model_bytes(tmp_path / "killed") == model_bytes(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_a_learner_killed_during_the_first_start_is_restarted(
    ray_instance: None, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = "{all: {roles: [learner, generator, assistant, reference, reward], threads: 1}}"
    recipe = make_recipe(placement="{mode: ray, groups: " + groups + "}", steps=1)
    killed: list[int] = []

    def kill() -> None:
        """The process of the group, as soon as it loads its roles."""
        while not killed:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "".join(process.cmdline()[:1]).startswith("ray::WorkerActor.build"):  # a dead one has no line
                        process.kill()
                        killed.append(process.pid)
            time.sleep(0.02)

    killer = Killer(monkeypatch, {})
    thread = threading.Thread(target=kill)
    thread.start()
    run.run(recipe, tmp_path / "out", callback=killer)
    thread.join()
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
        steps=2,
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run.run(recipe, whole)
    with monkeypatch.context() as patch:
        callback = StopAt(patch, 1, 1)  # in the middle of a cycle
        with pytest.raises(Stopped):
            run.run(recipe, broken, callback=callback)
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


def test_a_stuck_process_is_named(ray_instance: None, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    plugin = tmp_path / "stuck.py"
    plugin.write_text(STUCK, "utf-8")
    groups = "{train: {roles: [learner, generator, assistant, reference], threads: 1}, score: {roles: [reward]}}"
    recipe = make_recipe(
        placement="{mode: ray, step_timeout_s: 30, groups: " + groups + "}",
        algorithm__rewards=f"[{{name: '{plugin}:Stuck', label: stuck}}]",
    )
    cluster = RayCluster(recipe)
    try:
        with pytest.raises(RunError, match=r"learner did not answer within 30 s") as error:
            cluster.call_all("learner", LearnerRole.step, 0, ["a", "b", "c", "d"])
    finally:
        cluster.close()
    assert "train/0: learner.step for" in str(error.value)
    assert "waiting for another process" in str(error.value)
    assert "score/0: reward.value_and_grad for" in str(error.value)
