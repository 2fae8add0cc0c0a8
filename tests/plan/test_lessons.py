"""Lessons of rewards that learn, in the plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning import cost, plan
from rlhf_t2i.tools.planning.speed import Measured, Passes
from tests.training import online_reward

MakeRecipe = Callable[..., Recipe]


def test_lessons_of_a_reward_that_learns_are_planned(make_recipe: MakeRecipe) -> None:
    """Of 4 images: drawn, decoded and seen by its network, before each update; two more lessons before the first."""
    rewards = f"[{{name: '{online_reward.__file__}:Learns', label: learned}}]"
    recipe = make_recipe(algorithm__rewards=rewards)
    speed = Measured(dict.fromkeys(("network", "decoder", "reward:learned"), Passes(1.0, 1.0, 1.0)))
    found = plan.step_time(recipe, speed)
    lesson = {span.call.name: span.seconds for span in found.timeline.spans if "lesson" in span.call.name}
    assert sum(lesson.values()) == 4 + (4 + 4)
    assert found.lessons == 2 * 12
    assert found.step == pytest.approx(sum(found.timeline.busy().values()))
    assert cost.duration(recipe, found, 1).warmup == pytest.approx(24 / 3600)
    many = make_recipe(algorithm__rewards=rewards.replace("label:", "options: {prompts: 64}, label:"))
    assert needs(many) > needs(recipe)  # 128 images are drawn and decoded at once


def needs(recipe: Recipe) -> int:
    (group,) = plan.make(recipe).groups
    return group.memory.device
