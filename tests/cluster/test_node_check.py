"""``plan --address`` and ``run --address``: what is wrong with a node of the cluster is said in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray

from rlhf_t2i.cluster import connect, node_check
from rlhf_t2i.cluster.node_check import ClusterState
from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils import versions

VERSIONS = {"python": "3.12.1", "torch": "2.13.0+cpu", "peft": "0.20"}
Answer = tuple[dict[str, str], list[str]] | Exception


def node(number: int, alive: bool = True, **more: Any) -> dict[str, Any]:
    address = f"10.0.0.{number}"
    return {
        "NodeID": f"{number:056x}", "NodeManagerAddress": address, "NodeManagerHostname": f"host{number}",
        "Alive": alive, **more,
    }  # fmt: skip


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ClusterState]:
    """A cluster whose nodes answer in the given ways."""

    def inspect(nodes: list[dict[str, Any]], answers: list[Answer]) -> ClusterState:
        def get(reference: int, timeout: float) -> Any:
            answer = answers[reference]
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(node_check, "join", lambda address: address)
        monkeypatch.setattr(versions, "computing", lambda: VERSIONS)
        fake_ray(monkeypatch, nodes, get, len(answers))
        return node_check.inspect("10.0.0.1:6379", ["/models/sdxl"])

    return inspect


def fake_ray(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]], get: Callable[..., Any], asked: int) -> None:
    task, context = MagicMock(), MagicMock()
    task.options.return_value.remote.side_effect = range(asked)
    context.get_node_id.return_value = nodes[0]["NodeID"]
    for name, fake in {
        "nodes": lambda: nodes,
        "cluster_resources": lambda: {"CPU": 8.0},
        "remote": lambda **options: lambda function: task,
        "wait": lambda *args, **options: ([], []),
        "get": get,
        "shutdown": lambda: None,
        "get_runtime_context": lambda: context,
    }.items():
        monkeypatch.setattr(ray, name, fake)


def test_a_run_asks_the_nodes_that_it_was_given_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node(1), node(2), node(3)]
    given = [nodes[0]["NodeID"], nodes[1]["NodeID"], nodes[1]["NodeID"]]
    monkeypatch.setattr(versions, "computing", lambda: VERSIONS)
    fake_ray(monkeypatch, nodes, lambda reference, timeout: (VERSIONS, []), asked=1)
    node_check.check(given, ["/out"])
    fake_ray(monkeypatch, nodes, lambda reference, timeout: (VERSIONS | {"peft": "0.1"}, ["/out"]), asked=1)
    with pytest.raises(UsageError, match=r"^node 10\.0\.0\.2 \(host2\) has other packages: .*\(host2\) has no /out"):
        node_check.check(given, ["/out"])
    fake_ray(monkeypatch, nodes, lambda *_: pytest.fail("asked its own node"), asked=0)
    node_check.check(given[:1], ["/out"])


def test_every_node_that_cannot_take_part_is_named_with_the_remedy(ask: Callable[..., ClusterState]) -> None:
    failed = RuntimeError("Traceback\n  File ...\nModuleNotFoundError: No module named 'rlhf_t2i'\n")
    state = ask(
        [node(1), node(2), node(3), node(4), node(6), node(5, alive=False, DeathReasonMessage="missed heartbeats")],
        [
            ({"python": "3.12.1", "torch": "2.13.0+cu128", "peft": "0.20"}, []),  # another build of the same version
            ({"python": "3.12.1", "torch": "2.9.1"}, ["/models/sdxl"]),
            ray.exceptions.GetTimeoutError("no"),
            failed,
            ray.exceptions.TaskUnschedulableError("The node does not exist any more"),
        ],
    )
    assert state.resources == {"CPU": 8.0, "GPU": 0.0}
    assert state.problems == [
        "node 10.0.0.2 (host2) has other packages: torch 2.9.1 (here 2.13.0+cpu), peft is missing (here 0.20): install "
        "the same environment there",
        "node 10.0.0.2 (host2) has no /models/sdxl: put it on a file system that all nodes share",
        "node 10.0.0.3 (host3) does not answer within 60 s: it is overloaded, or its ports are closed",
        "node 10.0.0.4 (host4) cannot run rlhf-t2i (ModuleNotFoundError: No module named 'rlhf_t2i'): install the same "
        "environment there",
        "node 10.0.0.6 (host6) left the cluster while it was asked",
    ]
    assert state.lost == ["node 10.0.0.5 (host5) has left the cluster (missed heartbeats)"]


def test_a_node_that_came_back_is_not_lost(ask: Callable[..., ClusterState]) -> None:
    assert ask([node(1), node(1, alive=False)], [(VERSIONS, [])]).lost == []


def test_a_node_answers_with_its_packages_and_what_it_lacks(tmp_path: Path) -> None:
    ours = versions.computing()
    found, missing = node_check.answer(list(ours), [str(tmp_path), str(tmp_path / "none")])
    assert found == ours
    assert missing == [str(tmp_path / "none")]


def test_a_machine_that_is_no_node_is_told_to_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "_place", lambda address: address)
    monkeypatch.setattr(connect, "_introduce", lambda *args: None)
    error = RuntimeError("No node info found matching attributes: '' when trying to resolve node to connect to.")
    monkeypatch.setattr(ray, "init", MagicMock(side_effect=error))
    with pytest.raises(UsageError, match=r"this machine is no node of it: run `ray start --address=10\.0\.0\.1:6379`"):
        connect.join("10.0.0.1:6379")
