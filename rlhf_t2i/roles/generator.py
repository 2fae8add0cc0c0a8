"""The one-step generator for sampling: the assistant's training data, previews and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm import rng
from rlhf_t2i.families.networks import one_step
from rlhf_t2i.roles.context import RankContext
from rlhf_t2i.roles.dispatch import batched


class GeneratorRole:
    """Samples with the current weights, without a graph.

    Args:
        context: The process.
        live: The learner's network where it lives in this process; it is shared, not copied.
    """

    def __init__(self, context: RankContext, live: Callable[..., Any] | None = None) -> None:
        self._store, self._dtype, self._device = context.store, context.dtype, context.device
        self._timestep = context.recipe.models.generator_timestep
        self._networks: dict[str, Callable[..., Any]] = {}
        self._networks["raw"] = live if live is not None else self._frozen()

    def _frozen(self) -> nn.Module:
        return self._store.generator_unet().eval().requires_grad_(False)

    def load(self, weights: str, state: dict[str, Tensor]) -> None:
        """Take over weights, as ``raw`` or ``ema``."""
        if weights not in self._networks:
            self._networks[weights] = self._frozen()
        network = self._networks[weights]
        assert isinstance(network, nn.Module)
        network.load_state_dict(state)

    @batched("prompts", "keys", collective=True)
    @torch.no_grad()
    def sample(self, prompts: Sequence[str], keys: Sequence[rng.Key], weights: str = "raw") -> Tensor:
        """Latents [B, C, h, w] in float32, sample i a function of weights, prompt and ``keys[i]`` alone."""
        z = rng.normal(self._store.latent_shape, keys).to(self._device)
        cond = self._store.conditioner.encode(prompts)
        return one_step(self._networks[weights], z, cond, self._timestep, self._store.schedule, self._dtype)
