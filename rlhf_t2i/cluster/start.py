"""Start the roles of a run where the recipe places them."""

from __future__ import annotations

from rlhf_t2i.cluster.base import Cluster
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training.folder import RunFolder


def start(recipe: Recipe, folder: RunFolder, address: str | None = None) -> Cluster:
    """A cluster of roles; ``close()`` it.

    Raises:
        UsageError: The placement cannot work, or the Ray cluster lacks the devices.
    """
    if recipe.placement.mode == "local":
        from rlhf_t2i.cluster.local import LocalCluster

        return LocalCluster(recipe, folder.failures)
    from rlhf_t2i.cluster.ray_cluster import RayCluster

    return RayCluster(recipe, folder.failures, address)
