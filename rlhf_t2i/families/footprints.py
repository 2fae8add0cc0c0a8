"""The networks of a recipe, ready to be counted on the meta device: configurations are read, weights are not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from rlhf_t2i.families import adapters, flops, sources
from rlhf_t2i.families.counting import Network
from rlhf_t2i.families.sources import ModelRef
from rlhf_t2i.families.store import DTYPES, ModelStore, set_precision
from rlhf_t2i.plugins import guard, traits
from rlhf_t2i.recipe.schema import Lora, Recipe

_META = torch.device("meta")


class Footprints:
    """The networks of a recipe on the meta device.

    Args:
        recipe: The recipe.
        device: Where the networks are to run; the meta device stands for a GPU.

    Raises:
        UsageError: The reference's configuration is missing, damaged, or of an unknown family.
    """

    def __init__(self, recipe: Recipe, device: torch.device = _META) -> None:
        self._recipe, self._device = recipe, device
        self._precision = recipe.optimization.precision
        self.store = ModelStore(recipe.models, recipe.student, _META, self._precision)
        _ = self.store.schedule  # built here, with values: below, everything new is on the meta device
        config = json.dumps(self.store.family.network_config, sort_keys=True, default=str)
        self._parts: dict[str, Network | None] = {}
        self._where = (recipe.models.reference, recipe.models.vae, self.store.size, config)

    def place(self, role: str) -> ModelRef:
        """Where the weights of learner, assistant or reference come from; equal places are held once per process."""
        models = self.store.models
        text = {"learner": models.generator, "assistant": models.assistant or models.reference}.get(role)
        return self.store.family.network_place(sources.parse(text or models.reference))

    def network(self, lora: Lora | None = None) -> Network:
        """The denoising network that learner, assistant and reference share, in the compute precision.

        Args:
            lora: Adapters that are trained in place of the network.
        """
        family, dtype = self.store.family, DTYPES[self._precision]

        def build() -> nn.Module:
            network = nn.Module.to(family.build_network(), dtype)  # diffusers' own warns
            if lora is not None:
                adapters.add(network, lora, lora.targets or family.adapter_targets, seed=0)
            return network

        def call(network: nn.Module) -> tuple[Tensor, Tensor]:
            with _META:
                x_t = torch.empty(1, *self.store.latent_shape, requires_grad=True)
                cond = family.example_conditioning(1, *self.store.size, dtype)
                return x_t, self.store.predict(network, x_t, torch.empty(1), cond)

        settings = None if lora is None else lora.model_dump_json()
        return Network(("network", *self._where, self._precision, settings), build, call, family.enable_checkpointing)

    def decoder(self) -> Network:
        """The decoder of latents, in ``models.vae_precision``."""
        precision = self._recipe.models.vae_precision

        def build() -> nn.Module:
            return set_precision(self.store.family.build_decoder(self.store.vae), precision, self._device)

        def call(decoder: nn.Module) -> tuple[Tensor, Tensor]:
            with _META:
                latents = torch.empty(1, *self.store.latent_shape, requires_grad=True)
                return latents, decoder.decode(latents)

        return Network(("decoder", *self._where, precision, self._device), build, call)

    def text_encoders(self) -> Network:
        """The text encoders, for their parameters: their work per step is small, and each prompt is encoded once."""

        def call(_network: nn.Module) -> tuple[Tensor, Tensor]:
            raise NotImplementedError("text encoders are not run on the meta device")

        return Network(("text encoders", *self._where), self.store.family.build_text_encoders, call)

    @property
    def precision(self) -> str:
        """Of the computation."""
        return self._precision

    def part(self, name: str) -> Network | None:
        """A network by the names of :mod:`rlhf_t2i.families.flops`; None for a reward whose network is not known."""
        if name in self._parts:
            return self._parts[name]
        made = {flops.NETWORK: self.network, flops.DECODER: self.decoder}
        network = made[name]() if name in made else self.rewards[name.partition(":")[2]][1]
        return self._parts.setdefault(name, network)

    @cached_property
    def rewards(self) -> Mapping[str, tuple[str, Network | None]]:
        """Rewards on images by label: the name of their weights, which they may share, and the network if known."""
        found = traits.resolve(self._recipe).rewards
        return {reward.key: self._reward(reward) for reward in found if not reward.on_latents}

    def _reward(self, reward: traits.RewardTraits) -> tuple[str, Network | None]:
        footprint = reward.footprint
        if footprint is None:
            return reward.key, None

        def build() -> nn.Module:
            with _META, guard.building(f"reward {reward.name!r}: its footprint cannot be built", reward.plugin):
                return footprint.build().to(DTYPES[self._precision]).requires_grad_(False)

        def call(network: nn.Module) -> tuple[Tensor, Tensor]:
            with _META:
                images = torch.empty(1, 3, *self.store.size, requires_grad=True)
                return images, network(images)

        key = ("reward", reward.name, reward.options.model_dump_json(), self.store.size, self._precision)
        return footprint.weights, Network(key, build, call)
