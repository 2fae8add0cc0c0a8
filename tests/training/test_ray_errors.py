"""Ray's own errors, many lines long, become one sentence, and those of a dead process a restart."""

from __future__ import annotations

import math
import signal
import socket
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray
import torch

from rlhf_t2i.cluster import clients, control, ray_cluster
from rlhf_t2i.cluster.control import RayMonitor
from rlhf_t2i.cluster.ray_cluster import RayCluster
from rlhf_t2i.errors import ProcessLost, RunError, Stopped
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

    monkeypatch.setattr(clients, "_CHECK_EVERY_S", math.inf)
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
    cluster._weight_store, cluster._monitor = None, RayMonitor()
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
    monkeypatch.setattr(clients, "_CHECK_EVERY_S", math.inf)
    monkeypatch.setattr(placed, "_lost", lambda: "all/1", raising=False)
    monkeypatch.setattr(placed, "_describe_processes", lambda: "all/0: idle", raising=False)
    with pytest.raises(ProcessLost, match="process all/1 died while the"):  # heard from a peer, in a collective
        CALLS[call](placed)
    limit = r"7 s \(timeout_s of pickscore\)" if call == "scores" else r"3600 s \(placement\.step_timeout_s\)"
    with pytest.raises(RunError, match=f"did not answer within {limit}; all/0: idle"):
        CALLS[call](placed)


def test_a_long_call_looks_at_ray_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's control store is gone for a minute before Ray ends the process with a line of its own."""
    node = MagicMock()
    node.dead_processes.side_effect = [[], [("monitor", None)], [("gcs_server", None)]]
    monkeypatch.setattr("ray._private.worker._global_node", node)
    monkeypatch.setattr(ray, "get", MagicMock(side_effect=EXCEPTIONS.GetTimeoutError("no")))
    monitor = RayMonitor(own=True)
    with pytest.raises(ProcessLost, match="Ray's own process gcs_server died"):
        clients.get([], clients.Limit(3600), "learner", monitor.check)
    assert node.dead_processes.call_count == 3
    assert not monitor.alive()


def test_a_ray_that_is_gone_is_not_asked_to_free_anything(monkeypatch: pytest.MonkeyPatch, placed: RayCluster) -> None:
    """Each question would wait for a minute."""
    node = MagicMock()
    node.dead_processes.return_value = [("gcs_server", None)]  # since the last call, while the model was written
    monkeypatch.setattr("ray._private.worker._global_node", node)
    placed._monitor.own, placed._group, placed._started_ray = True, MagicMock(), True
    asked = MagicMock()
    monkeypatch.setattr(ray, "kill", asked)
    monkeypatch.setattr(ray_cluster, "remove_placement_group", asked)
    monkeypatch.setattr(ray_cluster, "stop", stopped := MagicMock())
    placed.close()
    assert (asked.called, stopped.called) == (False, True)


def test_a_ray_that_dies_while_the_roles_start_is_started_again(
    monkeypatch: pytest.MonkeyPatch, make_recipe: Callable[..., Recipe]
) -> None:
    """Its answers to the questions of the start are errors of many kinds, and none says that it died."""
    node = MagicMock()
    node.dead_processes.return_value = [("raylet", None)]
    monkeypatch.setattr("ray._private.worker._global_node", node)
    monkeypatch.setattr(RayMonitor, "of_own_ray", lambda: RayMonitor(own=True))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_cluster, "start_local_ray", lambda processes: None)
    monkeypatch.setattr(ray_cluster, "stop", stopped := MagicMock())
    monkeypatch.setattr(ray, "cluster_resources", asked := MagicMock())
    recipe = make_recipe(
        placement="{mode: ray, groups: {all: {roles: [learner, generator, assistant, reference, reward]}}}"
    )
    asked.side_effect = Exception("Placement group does not exist")
    with pytest.raises(ProcessLost, match=r"^Ray's own process raylet died while the roles started$"):
        RayCluster(recipe)
    asked.side_effect = Stopped(signal.SIGTERM)  # systemd sends it to Ray, too
    with pytest.raises(Stopped):
        RayCluster(recipe)
    assert stopped.call_count == 2


def test_a_head_node_that_does_not_answer_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setattr(control, "_PROBE_EVERY_S", -1.0)
    monitor = RayMonitor(head=address)
    monitor.check()
    assert monitor.alive()
    listener.close()
    monitor.check()  # not yet: it may come back
    monkeypatch.setattr(control, "_HEAD_SILENT_S", 0.0)
    with pytest.raises(RunError, match=f"the head node of the Ray cluster at {address} has not answered .* --resume"):
        monitor.check()
    assert not monitor.alive()
