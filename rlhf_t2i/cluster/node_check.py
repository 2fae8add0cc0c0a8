"""What a Ray cluster has, and what is wrong with its nodes: asked before roles start on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_t2i.cluster.connect import join
from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.families import sources
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.utils import files, versions

_ANSWER_TIMEOUT_S = 60.0  # a node starts a process for its answer
_START_TIMEOUT_S = 300.0  # a run is not given up for a node that is only slow


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


def inspect(address: str, paths: Sequence[str]) -> ClusterState:
    """Ask every node of the cluster for its packages and for the run's files.

    Args:
        address: HOST:PORT of the head.
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
            _problems(alive, paths, _ANSWER_TIMEOUT_S),
            [
                f"{_name(node)} has left the cluster ({node.get('DeathReasonMessage') or 'no reason known'})"
                for node in gone
            ],
        )
    finally:
        ray.shutdown()


def check(node_ids: Iterable[str], paths: Sequence[str]) -> None:
    """Ask the nodes on which roles will start, but for this process's own: its files and packages are those here.

    Args:
        node_ids: Of the joined cluster.
        paths: Files and folders that must be there on every node.

    Raises:
        UsageError: A node has other packages or lacks a file, or does not answer.
    """
    wanted = set(node_ids) - {ray.get_runtime_context().get_node_id()}
    problems = _problems([node for node in ray.nodes() if node["NodeID"] in wanted], paths, _START_TIMEOUT_S)
    if problems:
        raise UsageError("; ".join(problems))


def files_of(recipe: Recipe) -> list[str]:
    """Local models, embeddings and plugin files: what roles read on their own node. Prompts are read by the driver."""
    return list(dict.fromkeys(_paths(recipe)))


def _paths(recipe: Recipe) -> Iterator[str]:
    models = recipe.models
    for text in (models.reference, models.generator, models.assistant, models.vae):
        if text and (source := sources.parse(text)).is_local:
            yield source.location
    if models.embeddings is not None and files.expanded(models.embeddings).exists():
        yield str(files.expanded(models.embeddings))
    algorithm = recipe.algorithm
    for choice in [algorithm.divergence, *algorithm.rewards, *algorithm.eval_rewards]:
        file = choice.name.rpartition(":")[0]
        for value in [file, *choice.options.values()]:
            if isinstance(value, str) and value.startswith(("/", "~")) and files.expanded(value).exists():
                yield str(files.expanded(value))


def _problems(nodes: Sequence[Mapping[str, object]], paths: Sequence[str], timeout: float) -> list[str]:
    """Ask all nodes at once; those that do not answer in ``timeout`` seconds are waited for together."""
    ours = versions.computing()
    task = ray.remote(num_cpus=0, max_retries=0)(answer)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            list(ours), list(paths)
        ): _name(node)
        for node in nodes
    }
    ray.wait(list(asked), num_returns=len(asked), timeout=timeout)
    problems = []
    for reference, name in asked.items():
        try:
            found, missing = ray.get(reference, timeout=0)
        except ray.exceptions.GetTimeoutError:
            problems.append(f"{name} does not answer within {timeout:g} s: it is overloaded, or its ports are closed")
        except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
            problems.append(f"{name} left the cluster while it was asked")
        except (ray.exceptions.RayError, RuntimeError) as error:
            problems.append(f"{name} cannot run rlhf-t2i ({_cause(error)}): install the same environment there")
        else:
            problems += _differences(name, ours, found, missing)
    return problems


def answer(packages: list[str], paths: list[str]) -> tuple[dict[str, str], list[str]]:
    """Runs on a node: its versions of packages, and those of the paths that are not there."""
    return versions.installed(packages), [path for path in paths if not Path(path).exists()]


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
