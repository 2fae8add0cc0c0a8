"""Seconds a step, estimated from FLOPs and a device's peak: no launch overheads, no optimiser, no traffic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_t2i.flops import StepFlops
from rlhf_t2i.planning.devices import ACHIEVED, Device
from rlhf_t2i.recipe import Recipe

_TF32 = 2
"""A decoder in float32, whose convolutions take TF32, has half the rate of bf16 on every device of the table."""
_RECOMPUTED = {"learner": 1 / 3, "assistant": 1 / 2, "reference": 1 / 2, "decoder": 1 / 2, "rewards": 1 / 2}


@dataclass(frozen=True)
class StepTime:
    """Seconds of a generator update with its assistant updates."""

    generator: float
    assistant: float

    @property
    def step(self) -> float:
        """Both phases."""
        return self.generator + self.assistant


def of_recipe(
    recipe: Recipe, placed: Mapping[str, tuple[str, int]], work: StepFlops, device: Device
) -> StepTime | None:
    """Estimate a step; None in fp32, whose rate depends on switches the recipe does not have, or uncounted networks.

    Within a phase the roles of one group take turns, groups beside each other run at once, and the learner's own
    forward and backward overlap with nobody.
    """
    if recipe.optimisation.precision != "bf16" or not work.assistant["assistant"]:
        return None
    images = recipe.optimisation.batch_size
    kl = recipe.algorithm.divergence.name == "kl"

    def again(role: str) -> bool:
        return recipe.optimisation.checkpoints("reward" if role in ("decoder", "rewards") else role)

    def seconds(role: str, flops: float, ranks: int, recomputed: float) -> float:
        slower = _TF32 if role == "decoder" and recipe.models.vae_precision == "fp32" else 1
        return images * flops * (1 + recomputed) * slower / (ranks * device.bf16 * ACHIEVED)

    own, beside = 0.0, dict[str, float]()
    for role, flops in work.generator.items():
        label = next((name for name in placed if name.startswith("reward:")), "learner")
        group, ranks = placed[label if role in ("decoder", "rewards") else role]
        # Under the KL, assistant and reference keep no graph: nothing is recomputed.
        kept = again(role) and not (kl and role in ("assistant", "reference"))
        spent = seconds(role, flops, ranks, _RECOMPUTED[role] if kept else 0.0)
        if role == "learner":
            own = spent
        else:
            beside[group] = beside.get(group, 0.0) + spent
    rounds = recipe.algorithm.assistant_steps
    drawn = seconds("generator", work.assistant["generator"], placed["generator"][1], 0.0)
    trained = seconds(
        "assistant", work.assistant["assistant"], placed["assistant"][1], 1 / 3 if again("assistant") else 0.0
    )
    return StepTime(own + max(beside.values(), default=0.0), rounds * (drawn + trained))
