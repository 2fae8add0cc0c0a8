"""What a run refuses before it starts a role, and ``plan`` with the same sentence: plugins and models."""

from __future__ import annotations

import torch

from rlhf_t2i.families import adapters, sources
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.plugins import comparing, traits
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import trackers


def check_plugins(recipe: Recipe) -> None:
    """Check trackers, divergence and rewards.

    Raises:
        UsageError: A package is missing, or a plugin refuses its options.
    """
    trackers.check(recipe.logging.trackers)
    traits.resolve(recipe).preflight()
    comparing.check(recipe)


def check_models(recipe: Recipe) -> ModelStore:
    """Check models by their configurations, reading no weights but those that a manifest covers.

    Returns:
        The models, on the CPU.

    Raises:
        UsageError: A model is missing, damaged, or does not go with the others or the recipe's timesteps.
    """
    store = ModelStore(recipe.models, recipe.student, torch.device("cpu"))
    store.check()
    for role in ("generator", "assistant"):
        store.timestep_range(recipe.algorithm.timesteps, role)
    store.timestep_law(recipe.algorithm.timesteps)
    _check_adapters(recipe, store)
    return store


def _check_adapters(recipe: Recipe, store: ModelStore) -> None:
    """Look for the layers that the recipe names itself, in networks without weights."""
    for role, family in (("generator", store.generator_family), ("assistant", store.family)):
        lora = getattr(recipe.optimization, role).lora
        if lora is not None and lora.targets is not None:
            key = ("optimization", role, "lora", "targets")
            with torch.device("meta"):
                network = family.build_network()
            adapters.check(network, lora.targets, f"{recipe.where(key)}: {'.'.join(key)}")


def are_local(recipe: Recipe) -> bool:
    """Whether all models are files of this machine, so that checking them asks no hub."""
    models = recipe.models
    named = (models.reference, models.generator, models.assistant, models.vae)
    return all(sources.parse(text).is_local for text in named if text is not None)
