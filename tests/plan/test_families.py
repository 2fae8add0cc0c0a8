"""Every family is planned through the seam alone: what is counted is what is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning import plan as planning
from tests import tiny
from tests.families.test_oracle import MODELS, SIDES
from tests.plan.test_fit import SPEED


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_planned(name: str, tmp_path: Path) -> None:
    folder = MODELS[name](tmp_path)
    side = SIDES.get(name, 16)
    models = {"reference": str(folder), "generator": str(folder), "height": side, "width": side}
    settings = {"batch_size": 2, "generator": {"lora": {"rank": 2}}}

    def recipe(checkpointing: bool) -> Recipe:
        changes = {**settings, "gradient_checkpointing": checkpointing}
        return Recipe.model_validate(tiny.recipe_dict(folder, Path("/nowhere"), models=models, optimization=changes))

    kept, again = planning.make(recipe(False)), planning.make(recipe(True))
    store = ModelStore(recipe(False).models, recipe(False).student, torch.device("cpu"))
    for part, module in (("network", store.generator_network()), ("decoder", store.decoder)):
        assert kept.parts[part] == sum(p.numel() for p in module.parameters()), part
    assert kept.parts["text encoders"] == sum(p.numel() for p in store.conditioner.parameters())
    assert kept.latents == store.latent_shape
    for plain, recomputed in zip(kept.groups[0].roles, again.groups[0].roles, strict=True):
        if plain.role in ("learner", "assistant", "reference"):
            assert plain.memory.activations > recomputed.memory.activations > 0, plain.role
    assert planning.step_time(recipe(True), SPEED).step > planning.step_time(recipe(False), SPEED).step
