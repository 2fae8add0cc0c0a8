"""The generator for sampling: the assistant's training data, previews and evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm import rng
from rlhf_t2i.algorithm.student import keyed_noise
from rlhf_t2i.errors import RunError
from rlhf_t2i.families.base import NetworkCall
from rlhf_t2i.roles.context import RankContext
from rlhf_t2i.roles.dispatch import batched
from rlhf_t2i.roles.packing import Packed, unpack


class GeneratorRole:
    """Samples with the current weights, without a graph.

    Args:
        context: The process.
        live: The learner's network where it lives in this process; it is shared, not copied.
    """

    def __init__(self, context: RankContext, live: NetworkCall | None = None) -> None:
        self._store, self._device = context.store, context.device
        self._networks: dict[str, NetworkCall] = {"raw": self._like_the_learners(context) if live is None else live}

    def _like_the_learners(self, context: RankContext) -> nn.Module:
        """The learner's network before training, with its adapters, in the precision in which that computes."""
        network = context.trained_network(context.store.generator_network, context.recipe.optimization.generator)
        for parameter in network.parameters():  # buffers stay float32, as DeepSpeed leaves them
            parameter.data = parameter.data.to(context.dtype)
        return network.requires_grad_(False)  # in training mode, in which some operators round otherwise

    def load(self, weights: str, packed: Packed) -> None:
        """Take over weights.

        Args:
            weights: ``raw``: what the learner trains, or a part of it. ``ema``: the whole average, adapters merged.
            packed: The weights by name.

        Raises:
            RunError: They are not of this network.
        """
        if weights not in self._networks:
            self._networks[weights] = self._store.generator_network().eval().requires_grad_(False)
        network = self._networks[weights]
        assert isinstance(network, nn.Module)
        missing, unexpected = network.load_state_dict(unpack(packed), strict=False)
        foreign = [*unexpected, *(missing if weights == "ema" else ())]
        if foreign:
            raise RunError(f"the learner's {weights} weights do not fit the generator's network: {foreign[0]}")

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
