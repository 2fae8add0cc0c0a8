"""What a Ray cluster has, and what is wrong with its nodes: asked before a run is placed on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_t2i.cluster.connect import join
from rlhf_t2i.errors import first_line
from rlhf_t2i.utils.versions import installed

_ANSWER_TIMEOUT_S = 60.0  # a node starts a process for its answer


@dataclass(frozen=True)
class ClusterState:
    """A running Ray cluster.

    Attributes:
        resources: Number of CPUs and GPUs, ``{"CPU": 3.0, "GPU": 0.0}``.
        problems: One sentence per node that cannot take part in a run as it is.
        lost: One sentence per node that left the cluster and has not come back; a run does not need them.
    """

    resources: dict[str, float]
    problems: list[str]
    lost: list[str]


def inspect(address: str, versions: Mapping[str, str], paths: Sequence[str]) -> ClusterState:
    """Ask every node of the cluster for its packages and for the run's files.

    Args:
        address: HOST:PORT of the head.
        versions: By package, of this process: the nodes must have the same.
        paths: Files and folders that must be there on every node.

    Raises:
        UsageError: No cluster answers at the address, or it refuses this process.
    """
    join(address)
    try:
        nodes = ray.nodes()
        alive = [node for node in nodes if node["Alive"]]
        present = {node["NodeManagerAddress"] for node in alive}
        gone = [node for node in nodes if not node["Alive"] and node["NodeManagerAddress"] not in present]
        return ClusterState(
            {kind: float(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU")},
            _problems(alive, versions, paths),
            [
                f"{_name(node)} has left the cluster ({node.get('DeathReasonMessage') or 'no reason known'})"
                for node in gone
            ],
        )
    finally:
        ray.shutdown()


def _problems(nodes: Sequence[Mapping[str, object]], versions: Mapping[str, str], paths: Sequence[str]) -> list[str]:
    """Ask all nodes at once; those that do not answer are waited for together."""
    task = ray.remote(num_cpus=0, max_retries=0)(answer)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            list(versions), list(paths)
        ): _name(node)
        for node in nodes
    }
    ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_TIMEOUT_S)
    problems = []
    for reference, name in asked.items():
        try:
            found, missing = ray.get(reference, timeout=0)
        except ray.exceptions.GetTimeoutError:
            problems.append(
                f"{name} does not answer within {_ANSWER_TIMEOUT_S:g} s: it is overloaded, or its ports are closed"
            )
        except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
            problems.append(f"{name} left the cluster while it was asked")
        except (ray.exceptions.RayError, RuntimeError) as error:
            problems.append(f"{name} cannot run rlhf-t2i ({_cause(error)}): install the same environment there")
        else:
            problems += _differences(name, versions, found, missing)
    return problems


def answer(packages: list[str], paths: list[str]) -> tuple[dict[str, str], list[str]]:
    """Runs on a node: its versions of packages, and those of the paths that are not there."""
    return installed(packages), [path for path in paths if not Path(path).exists()]


def _differences(name: str, ours: Mapping[str, str], theirs: Mapping[str, str], missing: list[str]) -> list[str]:
    """What separates a node from this process. Builds of one version (2.13.0+cpu, 2.13.0+cu128) are alike."""
    other = [
        f"{package} {theirs.get(package, 'is missing')} (here {version})"
        for package, version in ours.items()
        if theirs.get(package, "").partition("+")[0] != version.partition("+")[0]
    ]
    problems = [f"{name} has other packages: {', '.join(other)}: install the same environment there"] if other else []
    if missing:
        problems.append(f"{name} has no {', '.join(missing)}: put it on a file system that all nodes share")
    return problems


def _name(node: Mapping[str, object]) -> str:
    host, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
    return f"node {address}" if host == address else f"node {address} ({host})"


def _cause(error: BaseException) -> str:
    """The line of a remote traceback that says what failed: its last."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), first_line(error))
