"""A plan beside a running Ray cluster: devices, packages, and files on the nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning.plan import Plan

if TYPE_CHECKING:
    from rlhf_t2i.cluster.node_check import ClusterState


def inspect(recipe: Recipe, address: str) -> ClusterState:
    """Ask every node for its packages and for the recipe's local files.

    Raises:
        UsageError: No cluster answers at the address, or it refuses this process.
    """
    from rlhf_t2i.cluster import node_check

    return node_check.inspect(address, node_check.files_of(recipe))


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
