"""A plan beside a running Ray cluster: devices, packages, and files on the nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import sources
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning.plan import Plan
from rlhf_t2i.training import provenance
from rlhf_t2i.utils import files

if TYPE_CHECKING:
    from rlhf_t2i.cluster.node_check import ClusterState


def inspect(recipe: Recipe, address: str) -> ClusterState:
    """Ask every node for its packages and for the recipe's local files.

    Raises:
        UsageError: No cluster answers at the address, or it refuses this process.
    """
    from rlhf_t2i.cluster import node_check

    return node_check.inspect(address, provenance.versions(), list(dict.fromkeys(_paths(recipe))))


def check(plan: Plan, cluster: ClusterState) -> None:
    """Compare a plan with a cluster.

    Raises:
        UsageError: A node differs from this machine or does not answer, or there are too few devices.
    """
    if cluster.problems:
        raise UsageError("; ".join(cluster.problems))
    kind = "GPU" if cluster.resources["GPU"] else "CPU"
    needed = 1 if plan.share_devices and kind == "GPU" else plan.devices
    if plan.mode == "ray" and cluster.resources[kind] < needed:
        sizes = ", ".join(f"{group.name}: {group.devices}" for group in plan.groups)
        raise UsageError(
            f"placement needs {plan.devices} {kind}s ({sizes}) but the cluster has {cluster.resources[kind]:g}: "
            "use fewer devices or let roles share a group"
        )


def _paths(recipe: Recipe) -> Iterator[str]:
    """Local models and plugin files: what roles read on their own node. Prompts are read by the driver."""
    models = recipe.models
    for text in (models.reference, models.generator, models.assistant, models.vae):
        if text and (source := sources.parse(text)).is_local:
            yield source.location
    algorithm = recipe.algorithm
    for choice in [algorithm.divergence, *algorithm.rewards, *algorithm.eval_rewards]:
        file = choice.name.rpartition(":")[0]
        for value in [file, *choice.options.values()]:
            if isinstance(value, str) and value.startswith(("/", "~")) and files.expanded(value).exists():
                yield str(files.expanded(value))
