"""Seconds a step, estimated from FLOPs and a device's rates: no optimizer, no text encoding, no traffic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_t2i.families.flops import StepFlops
from rlhf_t2i.plugins import traits
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning.devices import Rates

_TRAINED, _PULLED = 1 / 3, 1 / 2
"""Recomputed activations: one forward more, as a share of the model FLOPs of a trained network, and of a frozen one
(or one whose adapters alone are trained) through which a gradient flows."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a generator update with its assistant updates.

    Attributes:
        generator: Of the generator step.
        assistant: Of all assistant updates of a step.
        generator_roles: What each role works in the generator step, on one of its devices.
        assistant_roles: The same in the assistant updates.
    """

    generator: float
    assistant: float
    generator_roles: Mapping[str, float]
    assistant_roles: Mapping[str, float]

    @property
    def step(self) -> float:
        """Both phases."""
        return self.generator + self.assistant


def of_recipe(recipe: Recipe, placed: Mapping[str, tuple[str, int]], work: StepFlops, rates: Rates) -> StepTime | None:
    """Estimate a step; None where networks could not be counted.

    Within a phase the roles of one group take turns, groups beside each other run at once, and the learner's own
    forward and backward overlap with nobody.
    """
    if not work.assistant["assistant"]:
        return None
    images = recipe.optimization.batch_size
    needs_vjp = traits.resolve(recipe).divergence.needs_vjp

    def again(role: str) -> bool:
        return recipe.optimization.checkpoints("reward" if role in ("decoder", "rewards") else role)

    def seconds(role: str, flops: float, ranks: int, recomputed: float) -> float:
        return images * flops * (1 + recomputed) / (ranks * (rates.decoder if role == "decoder" else rates.unet))

    own, beside, generator = 0.0, dict[str, float](), dict[str, float]()
    for role, flops in work.generator.items():
        label = next((name for name in placed if name.startswith("reward:")), "learner")
        group, ranks = placed[label if role in ("decoder", "rewards") else role]
        # Without vector-Jacobian products assistant and reference keep no graph: nothing is recomputed.
        kept = again(role) and (needs_vjp or role not in ("assistant", "reference"))
        once = _TRAINED if role == "learner" and not recipe.optimization.generator.lora else _PULLED
        generator[role] = seconds(role, flops, ranks, once if kept else 0.0)
        if role == "learner":
            own = generator[role]
        else:
            beside[group] = beside.get(group, 0.0) + generator[role]
    rounds = recipe.algorithm.assistant_steps
    once = _PULLED if recipe.optimization.assistant.lora else _TRAINED
    recomputed = once if again("assistant") else 0.0
    assistant = {
        "generator": rounds * seconds("generator", work.assistant["generator"], placed["generator"][1], 0.0),
        "assistant": rounds * seconds("assistant", work.assistant["assistant"], placed["assistant"][1], recomputed),
    }
    return StepTime(own + max(beside.values(), default=0.0), sum(assistant.values()), generator, assistant)
