"""A generator in another process draws what one in the learner's process draws, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_t2i.cluster.local import LocalCluster
from rlhf_t2i.errors import RunError
from rlhf_t2i.recipe.schema import ROLES, Recipe
from rlhf_t2i.roles import packing
from rlhf_t2i.roles.worker import Worker, WorkerSpec

MakeRecipe = Callable[..., Recipe]
PROMPTS = [f"prompt {i}" for i in range(4)]
KEYS = [(0, "sample", i) for i in range(4)]
ADAPTERS = {"optimization__generator__lora": "{rank: 2}"}


def elsewhere(recipe: Recipe, **spec: Any) -> Worker:
    return Worker(WorkerSpec(recipe, "draw", ("generator",), **spec))


@pytest.mark.parametrize("changes", [{}, ADAPTERS], ids=["all weights", "adapters"])
def test_weights_in_parts_make_the_same_generator(make_recipe: MakeRecipe, changes: dict[str, Any]) -> None:
    recipe = make_recipe(**changes)
    worker = Worker(WorkerSpec(recipe, "all", ROLES))
    worker.connect({})
    learner, generator = worker.roles["learner"], elsewhere(recipe).roles["generator"]
    live = worker.roles["generator"]
    assert torch.equal(generator.sample(PROMPTS, KEYS), live.sample(PROMPTS, KEYS))
    learner.step(0, PROMPTS)
    assert not torch.equal(generator.sample(PROMPTS, KEYS), live.sample(PROMPTS, KEYS))
    sent = 0
    for part in range(3):
        size, packed = learner.pack("raw", part, 3)
        generator.load("raw", packed)
        sent += size
    assert torch.equal(generator.sample(PROMPTS, KEYS), live.sample(PROMPTS, KEYS))
    assert sent == sum(p.nbytes for p in learner.engine.module.parameters() if p.requires_grad)


def test_what_is_sent_does_not_change_with_the_learner(make_recipe: MakeRecipe) -> None:
    worker = Worker(WorkerSpec(make_recipe(), "all", ROLES))
    worker.connect({})
    learner = worker.roles["learner"]
    before = {name: value.clone() for name, value in learner.engine.copies()}
    _, packed = learner.pack("raw", 0, 1)
    learner.step(0, PROMPTS)
    assert all(torch.equal(value, before[name]) for name, value in packing.unpack(packed).items())
    assert packing.unpack(packed).keys() == before.keys()


def test_under_bf16_a_generator_elsewhere_computes_as_the_learners_network_does(make_recipe: MakeRecipe) -> None:
    """Halves of the bytes: its weights are the bf16 copies, not the float32 masters."""
    worker = elsewhere(make_recipe(optimization__precision="bf16"), distributed=True)
    network: Any = worker.roles["generator"]._networks["raw"]
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


def test_values_survive_bit_for_bit() -> None:
    tensors = {
        "matrix": torch.randn(3, 5).bfloat16(),
        "image": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "scalar": torch.tensor(2.5),
        "nothing": torch.zeros(0, 4),
    }
    packed = packing.pack(tensors.items())
    assert packing.size(packed) == sum(tensor.nbytes for tensor in tensors.values())
    for name, value in packing.unpack(packed).items():
        assert value.dtype == tensors[name].dtype
        assert torch.equal(value, tensors[name])


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_weights_of_another_network_are_refused(make_recipe: MakeRecipe, weights: str) -> None:
    generator = LocalCluster(make_recipe())._worker.roles["generator"]
    with pytest.raises(RunError, match=rf"the learner's {weights} weights do not fit the generator's network: other"):
        generator.load(weights, packing.pack({"other.weight": torch.zeros(1)}.items()))


def test_an_incomplete_average_is_refused(make_recipe: MakeRecipe) -> None:
    worker = Worker(WorkerSpec(make_recipe(optimization__ema="{half_life_kimg: 0.01}"), "all", ROLES))
    _, packed = worker.roles["learner"].pack("ema", 0, 1)
    worker.roles["generator"].load("ema", packed)
    packed.popitem()
    with pytest.raises(RunError, match="ema weights do not fit the generator's network"):
        worker.roles["generator"].load("ema", packed)
