"""bf16 and its float32 masters: has the network that computes come apart from the one that is trained?

Under bf16 the optimizer updates float32 master weights, and the network computes with their bf16 copies. Small updates
are not lost: they add up in the masters until a copy moves to the next bf16 number. Two things are measured, on a
sample of the weights:

``bf16_drift``
    ``|copy - master| / |master|``. Rounding to nearest errs by at most 2^-8 of a weight: more means that the copies are
    no copies any more.
``bf16_unmoved``
    Of the weights whose master has moved since the process started or was restored, the share whose copy has not. While
    it is near 1, samples and gradients are those of the network at the start, whatever the masters have learned.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_t2i.recipe.schema import Recipe

LARGEST_DRIFT = 2.0**-8
LARGEST_UNMOVED = 0.99


class Bf16Monitor:
    """Turns the measurements into warnings, one for each occurrence."""

    def __init__(self, recipe: Recipe) -> None:
        optimization = recipe.optimization
        rounds = max(1, recipe.algorithm.assistant_steps)
        self._warmup = {
            "generator": optimization.generator.warmup_steps,
            "assistant": -(-optimization.assistant.warmup_steps // rounds),
        }
        self._said: set[tuple[str, str]] = set()

    def take(self, step: int, copies: Mapping[str, Mapping[str, float]]) -> list[str]:
        """Judge a step's measurements.

        Args:
            step: Generator updates done.
            copies: ``bf16_drift`` and ``bf16_unmoved`` by network; empty without bf16.
        """
        warnings = []
        for name, measured in copies.items():
            drift, unmoved = measured.get("bf16_drift", 0.0), measured.get("bf16_unmoved", 0.0)
            drifted = not drift <= LARGEST_DRIFT
            # In the warm-up of the learning rate it is what one expects.
            stuck = unmoved > LARGEST_UNMOVED and step > self._warmup[name]
            for kind, found, text in (
                ("drift", drifted, f"the {name}'s bf16 weights differ from their float32 masters by {drift:.2%}, more "
                 f"than rounding can ({LARGEST_DRIFT:.2%}): end the run and --resume, or set precision: fp32"),
                ("stuck", stuck, f"{unmoved:.1%} of the {name}'s bf16 weights have not moved although their masters "
                 "have: the network still computes as at the start; raise its learning rate or set precision: fp32"),
            ):  # fmt: skip
                if found and (name, kind) not in self._said:
                    warnings.append(text)
                (self._said.add if found else self._said.discard)((name, kind))
        return warnings
