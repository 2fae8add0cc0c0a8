"""The score pseudo-Huber distance of Diff-Instruct* (equation 3.8)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveFloat
from torch import Tensor

from rlhf_t2i import plugins


class PseudoHuberOptions(plugins.Options):
    """``c`` in x0 units, or ``c_rel`` relative to the square root of a sample's size (iCT's heuristic)."""

    c: PositiveFloat | None = Field(None, description="the constant in x0 units; overrides c_rel")
    c_rel: PositiveFloat = Field(5.4e-4, description="c = c_rel * sqrt(elements of one sample)")


class PseudoHuber(plugins.Divergence):
    """``d(y) = sqrt(||y||^2 + c^2) - c``, the norm over all elements of one sample."""

    Options = PseudoHuberOptions
    options: PseudoHuberOptions
    needs_vjp = True
    order = 1

    def _radius(self, delta: Tensor) -> tuple[Tensor, float]:
        numel = delta[0].numel()
        c: Any = self.options.c if self.options.c is not None else self.options.c_rel * numel**0.5
        squared = delta.square().flatten(1).sum(1)
        return (squared + c**2).sqrt(), c

    def value(self, delta: Tensor) -> Tensor:
        """``d(delta)`` [B]."""
        radius, c = self._radius(delta)
        return radius - c

    def derivative(self, delta: Tensor) -> Tensor:
        """``delta / sqrt(||delta||^2 + c^2)``: at most a unit vector."""
        radius, _ = self._radius(delta)
        return delta / radius.reshape(-1, *([1] * (delta.ndim - 1)))
