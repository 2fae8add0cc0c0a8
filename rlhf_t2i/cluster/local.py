"""``placement: local``: every role in this process, without Ray; the debugger's mode and the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_t2i.algorithm import rng
from rlhf_t2i.recipe.schema import ROLES, Recipe
from rlhf_t2i.roles.worker import Worker, WorkerSpec


class LocalCluster:
    """One worker that holds all roles."""

    def __init__(self, recipe: Recipe, failures: Path | None = None) -> None:
        self._worker = Worker(WorkerSpec(recipe, "local", ROLES, failures=failures))
        self._worker.connect({})

    def call_all(self, role: str, method: str, *args: Any) -> list[Any]:
        """Call a method on every rank of a role; here, one."""
        return [self._worker.call(role, method, *args)]

    def sample(self, prompts: Sequence[str], keys: Sequence[rng.Key], weights: str) -> Tensor:
        """Latents [B, C, h, w] from the generator."""
        return self._worker.call("generator", "sample", prompts, keys, weights)

    def rewards(self, latents: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Every reward's value [B]."""
        return self._worker.call("reward", "score", latents, prompts)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1]."""
        return self._worker.call("reward", "decode", latents)

    def sync_generator(self) -> None:
        """Nothing to send: the generator is the learner's own network."""

    def readings(self) -> dict[str, dict[str, Any]]:
        """Timings and memory by process."""
        return {"local/0": self._worker.readings()}

    def close(self) -> None:
        """Nothing to stop."""
