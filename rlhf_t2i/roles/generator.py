"""The generator for sampling: the assistant's training data, previews and evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm import rng
from rlhf_t2i.algorithm.student import keyed_noise
from rlhf_t2i.families.base import NetworkCall
from rlhf_t2i.roles.context import RankContext
from rlhf_t2i.roles.dispatch import batched


class GeneratorRole:
    """Samples with the current weights, without a graph.

    Args:
        context: The process.
        live: The learner's network where it lives in this process; it is shared, not copied.
    """

    def __init__(self, context: RankContext, live: NetworkCall | None = None) -> None:
        self._store, self._device = context.store, context.device
        self._networks: dict[str, NetworkCall] = {"raw": self._frozen() if live is None else live}

    def _frozen(self) -> nn.Module:
        return self._store.generator_network().eval().requires_grad_(False)

    def load(self, weights: str, state: dict[str, Tensor]) -> None:
        """Take over weights, as ``raw`` or ``ema``."""
        if weights not in self._networks:
            self._networks[weights] = self._frozen()
        network = self._networks[weights]
        assert isinstance(network, nn.Module)
        network.load_state_dict(state)

    @batched("prompts", "keys", collective=True)
    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], keys: Sequence[rng.Key], weights: str = "raw", rollout: bool = False
    ) -> Tensor:
        """Latents [B, C, h, w] in float32, sample i a function of weights, prompt and ``keys[i]`` alone.

        Args:
            prompts: B prompts.
            keys: The randomness of each sample.
            weights: ``raw`` or ``ema``.
            rollout: Stop each sample at a step of its own, as training does; else all steps are run.
        """
        store = self._store
        noise = keyed_noise(store.latent_shape, keys, self._device)
        depths = store.student.sample_depths([(*key, "depth") for key in keys]) if rollout else None
        return store.generate(self._networks[weights], prompts, noise, depths)
