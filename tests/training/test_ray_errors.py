"""Ray's own errors, many lines long, become one sentence, and those of a dead process a restart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
import torch

from rlhf_t2i.cluster import clients, ray_cluster
from rlhf_t2i.cluster.ray_cluster import RayCluster
from rlhf_t2i.errors import ProcessLost, RunError
from rlhf_t2i.recipe import placement as geometry
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.learner import LearnerRole

EXCEPTIONS = ray.exceptions


@pytest.mark.parametrize(
    ("raised", "expected", "sentence"),
    [
        (EXCEPTIONS.OutOfMemoryError("1 worker(s) were killed\nConsidered workers: [\n..."), ProcessLost,
         "a process of the learner died: 1 worker(s) were killed"),
        (EXCEPTIONS.OutOfDiskError("Local disk is full\nThe object cannot be created\n"), RunError,
         "Ray's object store is full, and so is the disk it spills to, while the learner worked (Local disk is full)"),
        (EXCEPTIONS.GetTimeoutError("Get timed out\nmore"), clients.NoAnswer,
         "the learner did not answer within 5 s (placement.step_timeout_s)"),
        (EXCEPTIONS.ObjectLostError("00ff", None, ""), ProcessLost,
         "a process of the learner died: Failed to retrieve"),
    ],
)  # fmt: skip
def test_one_sentence(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception], sentence: str
) -> None:
    def get(_references: Any, timeout: float) -> None:
        raise raised

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(expected) as caught:
        clients.get([], clients.Limit(5.0), "learner")
    assert type(caught.value) is expected
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.fixture
def placed(make_recipe: Callable[..., Recipe]) -> RayCluster:
    """What a cluster knows of its placement, without processes."""
    groups = "{all: {devices: 2, roles: [learner, generator, assistant, reference, reward]}}"
    cluster = object.__new__(RayCluster)
    cluster._recipe = make_recipe(placement="{mode: ray, groups: " + groups + "}", algorithm__rewards__0__timeout_s=7)
    cluster._weight_store = None
    cluster._roles = geometry.check_placement(cluster._recipe)
    cluster._specs = ray_cluster._specs(cluster._recipe, cluster._roles, None)
    cluster._actors = {"all": [MagicMock(), MagicMock()]}
    return cluster


CALLS: dict[str, Callable[[RayCluster], Any]] = {
    "sample": lambda cluster: cluster.sample(["a cat"], [(0,)], "raw"),
    "scores": lambda cluster: cluster.rewards(torch.zeros(1), ["a cat"]),
    "decode": lambda cluster: cluster.decode(torch.zeros(1)),
    "call": lambda cluster: cluster.call_all("learner", LearnerRole.step, 0, ["a cat"]),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_an_evaluation_calls_tells_lost_and_stuck_processes_apart_too(
    monkeypatch: pytest.MonkeyPatch, placed: RayCluster, call: str
) -> None:
    raised: list[Exception] = [RuntimeError("Connection closed by peer"), EXCEPTIONS.GetTimeoutError("no")]

    def get(_references: Any, timeout: float) -> None:
        failed = raised.pop(0)
        raise EXCEPTIONS.RayTaskError("call", "", failed) if isinstance(failed, RuntimeError) else failed

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(placed, "_lost", lambda: "all/1", raising=False)
    monkeypatch.setattr(placed, "_describe_processes", lambda: "all/0: idle", raising=False)
    with pytest.raises(ProcessLost, match="process all/1 died while the"):  # heard from a peer, in a collective
        CALLS[call](placed)
    limit = r"7 s \(timeout_s of pickscore\)" if call == "scores" else r"3600 s \(placement\.step_timeout_s\)"
    with pytest.raises(RunError, match=f"did not answer within {limit}; all/0: idle"):
        CALLS[call](placed)
