"""Bytes that an update moves between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_t2i.plugins import traits
from rlhf_t2i.recipe.schema import Recipe

_WIRE = 4
"""Tensors between roles are float32, whatever the networks compute in."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one image of an update moves between two roles in different groups, there and back."""

    source: str
    target: str
    sent: int
    returned: int
    when: str


def per_image(
    recipe: Recipe, placed: Mapping[str, tuple[str, int]], latents: tuple[int, int, int]
) -> tuple[Traffic, ...]:
    """Bytes per image between groups; roles of one process call each other without copies."""
    size = _WIRE * latents[0] * latents[1] * latents[2]
    home = placed["learner"][0]
    through = traits.resolve(recipe).divergence.needs_vjp
    outer = recipe.algorithm.cfg.mode == "outer" and recipe.algorithm.cfg.guidance_scale > 0
    found = []
    for role, predictions in (("assistant", 1), ("reference", 2 if outer else 1)):
        if placed[role][0] != home:
            # Forward: x_t out, prediction back. Product: cotangent out, with x_t should the graph be lost; gradient
            # back.
            sent = size + (size + predictions * size if through else 0)
            returned = predictions * size + (size if through else 0)
            found.append(Traffic("learner", role, sent, returned, "generator step"))
    trained = [f"reward:{choice.key}" for choice in recipe.algorithm.rewards]
    for group in dict.fromkeys(placed[role][0] for role in trained if placed[role][0] != home):
        here = [role for role in trained if placed[role][0] == group]
        names = ", ".join(role.partition(":")[2] for role in here)
        found.append(Traffic("learner", f"reward ({names})", size, len(here) * (size + _WIRE), "generator step"))
    if placed["assistant"][0] != placed["generator"][0]:
        found.append(Traffic("assistant", "generator", 0, size, "assistant step"))
    return tuple(found)
