"""Start the roles of a run where the recipe places them."""

from __future__ import annotations

from pathlib import Path

from rlhf_t2i.cluster.base import Cluster
from rlhf_t2i.recipe.schema import Recipe


def start(recipe: Recipe, failures: Path, address: str | None = None) -> Cluster:
    """A cluster of roles; ``close()`` it.

    Args:
        recipe: The recipe.
        failures: Folder for the samples that a reward fails on.
        address: An existing Ray cluster to join.

    Raises:
        UsageError: The placement cannot work, or the Ray cluster lacks the devices.
    """
    if recipe.placement.mode == "local":
        from rlhf_t2i.cluster.local import LocalCluster

        return LocalCluster(recipe, failures)
    from rlhf_t2i.cluster.ray_cluster import RayCluster

    return RayCluster(recipe, failures, address)
