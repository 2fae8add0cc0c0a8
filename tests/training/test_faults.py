"""What happens when a process dies or a reward fails, over Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from rlhf_t2i.algorithm import rng
from rlhf_t2i.cluster import ray_cluster
from rlhf_t2i.cluster.actor import WorkerActor, network_interface
from rlhf_t2i.cluster.local import LocalCluster
from rlhf_t2i.cluster.ray_cluster import RayCluster
from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.roles.worker import Worker, WorkerSpec

pytestmark = [pytest.mark.ray, pytest.mark.slow]
MakeRecipe = Callable[..., Recipe]
PROMPTS = ["a red cat", "a blue dog", "a green owl", "a gold bee"]
GROUPS = (
    "{train: {roles: [learner, generator, assistant], threads: 1}, "
    "score: {roles: [reference], threads: 1}, judge: {roles: [reward], threads: 1}}"
)


PAIR = "{train: {roles: [learner, generator, assistant, reference], threads: 1}, judge: {roles: [reward], threads: 1}}"


@pytest.fixture
def cluster(ray_instance: None, make_recipe: MakeRecipe, tmp_path: Path) -> Iterator[RayCluster]:
    started = RayCluster(make_recipe(placement__mode="ray", placement__groups=GROUPS), tmp_path / "failures")
    yield started
    started.close()


def gradient(cluster: Any) -> torch.Tensor:
    keys = [(3, "probe", i) for i in range(4)]
    x0 = rng.normal((4, 8, 8), keys)
    return cluster.call_all("learner", LearnerRole.gradient_at_x0, "probe", x0, PROMPTS, keys, {})[0]


def test_a_killed_stateless_process_leaves_no_trace_and_a_killed_learner_ends_the_run(
    cluster: RayCluster, make_recipe: MakeRecipe
) -> None:
    before = gradient(cluster)
    for group in ("score", "judge"):
        ray.kill(cluster._actors[group][0], no_restart=False)
    after = gradient(cluster)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    local = gradient(LocalCluster(make_recipe()))
    assert float((after - local).norm() / local.norm()) < 1e-5
    ray.kill(cluster._actors["train"][0])
    with pytest.raises(RunError, match="a process of the learner died"):
        cluster.call_all("learner", LearnerRole.step, 0, PROMPTS)


def test_ranks_meet_on_the_interface_of_their_address() -> None:
    assert network_interface("127.0.0.1") == "lo"
    assert network_interface("192.0.2.1") is None  # nobody's: RFC 5737


def test_devices_that_ray_gives_back_late_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([3.0, 3.0, 4.0])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": next(free)})
    assert ray_cluster._available("CPU", 4) == 4
    free = iter([4.0])  # six will never be there: the answer comes at once
    assert ray_cluster._available("CPU", 6) == 4


def test_a_restarted_process_reads_like_any_other(make_recipe: MakeRecipe) -> None:
    spec = WorkerSpec(make_recipe(), "look", ("reference",))
    assert vars(WorkerActor(spec).reading()).keys() == vars(Worker(spec).reading()).keys()


BAD_REWARD = """
import torch
from rlhf_t2i.plugins import Reward

class Bad(Reward):
    def score(self, images, prompts):
        values = images.mean((1, 2, 3))
        return torch.where(torch.tensor([p == "a blue dog" for p in prompts]), values * float("nan"), values)
"""


def test_a_nan_reward_names_itself_and_saves_the_sample(
    ray_instance: None, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    plugin = tmp_path / "bad.py"
    plugin.write_text(BAD_REWARD, "utf-8")
    recipe = make_recipe(
        placement__mode="ray", placement__groups=PAIR, algorithm__rewards=f"[{{name: '{plugin}:Bad', label: bad}}]"
    )
    failures = tmp_path / "failures"
    cluster = RayCluster(recipe, failures)
    try:
        with pytest.raises(RunError, match=r"bad.*a blue dog"):
            cluster.call_all("learner", LearnerRole.step, 0, PROMPTS)
    finally:
        cluster.close()
    assert list(failures.rglob("*.png"))


DEADLY_REWARD = """
import os, signal
from rlhf_t2i.plugins import Reward

class Deadly(Reward):
    def score(self, images, prompts):
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does with one that takes too much memory
"""


def test_a_reward_that_always_kills_its_process_is_not_restarted_for_ever(
    ray_instance: None, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_t2i.cluster.ray_cluster._CALL_RETRIES", 1)
    plugin = tmp_path / "deadly.py"
    plugin.write_text(DEADLY_REWARD, "utf-8")
    rewards = f"[{{name: '{plugin}:Deadly', label: deadly}}]"
    cluster = RayCluster(make_recipe(placement__mode="ray", placement__groups=PAIR, algorithm__rewards=rewards))
    try:
        with pytest.raises(RunError, match="a process of the reward died"):
            cluster.call_all("learner", LearnerRole.step, 0, PROMPTS)
    finally:
        cluster.close()


def test_an_impossible_placement_is_refused_at_once(ray_instance: None, make_recipe: MakeRecipe) -> None:
    groups = (
        "{train: {devices: 16, roles: [learner, generator]}, "
        "rest: {devices: 16, roles: [assistant, reference, reward]}}"
    )
    recipe = make_recipe(placement__mode="ray", placement__groups=groups, optimization__batch_size=16)
    with pytest.raises(UsageError, match="needs 32 CPUs"):
        RayCluster(recipe)
