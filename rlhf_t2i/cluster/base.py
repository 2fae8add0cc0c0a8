"""What the controller asks of a placement, whether it is one process or many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlhf_t2i.algorithm import rng
from rlhf_t2i.roles.dispatch import Client
from rlhf_t2i.roles.generator import GeneratorRole
from rlhf_t2i.roles.reward import RewardRole


class Cluster(ABC):
    """The roles of a run, wherever they live."""

    @abstractmethod
    def clients(self, role: str) -> Sequence[Client]:
        """Clients that spread a call over all processes of a role: one, but for ``reward`` one per group of rewards."""

    @abstractmethod
    def call_all(self, role: str, method: str, *args: Any) -> list[Any]:
        """Call a method with the same arguments on every rank of a role; results in rank order."""

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
    def sync_generator(self) -> None:
        """Give the generator the learner's newest weights, where it does not share them."""

    @abstractmethod
    def readings(self) -> dict[str, dict[str, Any]]:
        """Seconds by role, bytes sent and peak memory of every process since the last reading."""

    @abstractmethod
    def close(self) -> None:
        """Stop what was started."""
