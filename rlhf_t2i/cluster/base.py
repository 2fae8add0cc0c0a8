"""What the controller asks of a placement, whether it is one process or many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from rlhf_t2i.algorithm import rng
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.dispatch import Client, Future, Method, P, T
from rlhf_t2i.roles.generator import GeneratorRole
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.roles.worker import Reading

Weights = Literal["raw", "ema"]
STEP_TIMEOUT_KEY = "placement.step_timeout_s"


class Cluster(ABC):
    """The roles of a run, wherever they live."""

    @abstractmethod
    def clients(self, role: str) -> Sequence[Client]:
        """Clients that spread a call over all processes of a role: one, but for ``reward`` one per group of rewards."""

    def call_all(self, role: str, method: Method[P, T], /, *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """Call a method with the same arguments on every rank of a role; results in rank order.

        The method is given as a function, ``LearnerRole.step``.
        """
        return self.submit_all(role, method, *args, **kwargs).result()

    @abstractmethod
    def submit_all(self, role: str, method: Method[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[list[T]]:
        """Start a call of every rank of a role; in one process it is made when its result is asked for."""

    def sample(self, prompts: Sequence[str], keys: Sequence[rng.Key], weights: str) -> Tensor:
        """Latents [B, C, h, w] from the generator."""
        return self.clients("generator")[0].submit(GeneratorRole.sample, prompts, keys, weights).result()

    def rewards(self, latents: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Values [B] of every reward, by label."""
        started = [client.submit(RewardRole.score, latents, prompts) for client in self.clients("reward")]
        return {label: values for future in started for label, values in future.result().items()}

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1]."""
        return self.clients("reward")[0].submit(RewardRole.decode, latents).result()

    @abstractmethod
    def submit_to_reward(self, label: str, method: Method[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start a method of the one process that holds a reward that learns; ``RewardRole.learn``."""

    @abstractmethod
    def sync_generator(self, weights: Weights = "raw") -> int:
        """Give the generator the learner's newest weights, or their average; returns the bytes that were sent.

        Nothing is sent of the raw weights where both roles share them.
        """

    @abstractmethod
    def finish_saving(self, role: str) -> None:
        """Wait until every rank of a trained role has written its state, while they train; for a thread of its own."""

    @abstractmethod
    def readings(self) -> dict[str, Reading]:
        """What every process (``group/rank``) has measured since the last reading."""

    @abstractmethod
    def close(self) -> None:
        """Stop what was started."""


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
