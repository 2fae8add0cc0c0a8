"""What the controller asks of a placement, whether it is one process or many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from rlhf_t2i.algorithm import rng


class Cluster(Protocol):
    """The roles of a run, wherever they live."""

    def call_all(self, role: str, method: str, *args: Any) -> list[Any]:
        """Call a method on every rank of a role at once; results in rank order."""

    def sample(self, prompts: Sequence[str], keys: Sequence[rng.Key], weights: str) -> Tensor:
        """Latents [B, C, h, w] from the generator, spread over its replicas."""

    def rewards(self, latents: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Every reward's value [B]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1]."""

    def sync_generator(self) -> None:
        """Give the generator the learner's newest weights, where it does not share them."""

    def readings(self) -> dict[str, dict[str, Any]]:
        """Seconds by role, bytes sent and peak memory of every process since the last reading."""

    def close(self) -> None:
        """Stop what was started."""
