"""bf16 and its float32 masters: does the network that computes still match the one that is trained?

Under bf16 the optimizer updates float32 master weights, and the network computes with their bf16 copies. Small updates
are not lost: they add up in the masters until a copy moves to the next bf16 number. Two things are measured, on a
sample of the weights:

``bf16_drift``
    ``|copy - master| / |master|``. Rounding to nearest errs by at most 2^-8 of a weight: above that the copies no
    longer match the masters.
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
    """Turns the measurements into warnings, one per occurrence."""

    def __init__(self, recipe: Recipe) -> None:
        optimization = recipe.optimization
        rounds = max(1, recipe.algorithm.assistant_steps)
        self._warmup = {
            "generator": optimization.generator.warmup_steps,
            "assistant": -(-optimization.assistant.warmup_steps // rounds),
        }
        self._active: set[tuple[str, str]] = set()

    def update(self, step: int, drifts: Mapping[str, Mapping[str, float]]) -> list[str]:
        """Check a step's measurements.

        Args:
            step: Generator updates done.
            drifts: ``bf16_drift`` and ``bf16_unmoved`` by network; empty without bf16.

        Returns:
            A warning for each problem that the last check did not find.
        """
        problems = {
            (name, kind): text
            for name, measured in drifts.items()
            for kind, text in self._problems(name, step, measured).items()
        }
        warnings = [text for key, text in problems.items() if key not in self._active]
        self._active = {*problems}
        return warnings

    def _problems(self, name: str, step: int, measured: Mapping[str, float]) -> dict[str, str]:
        drift, unmoved = measured.get("bf16_drift", 0.0), measured.get("bf16_unmoved", 0.0)
        problems = {}
        if not drift <= LARGEST_DRIFT:
            problems["drift"] = (
                f"the {name}'s bf16 weights differ from their float32 masters by {drift:.2%}, more than rounding can "
                f"({LARGEST_DRIFT:.2%}): end the run and resume it, or set precision: fp32"
            )
        if unmoved > LARGEST_UNMOVED and step > self._warmup[name]:  # during the warm-up it is expected
            problems["stuck"] = (
                f"{unmoved:.1%} of the {name}'s bf16 weights have not moved although their masters have: the network "
                "still computes as at the start; raise its learning rate or set precision: fp32"
            )
        return problems
