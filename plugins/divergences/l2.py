"""The squared L2 score distance (SIM with d = L2; SiD with alpha = 1)."""

from __future__ import annotations

from torch import Tensor

from rlhf_t2i import plugins


class L2(plugins.Divergence):
    """``d(y) = ||y||^2``."""

    needs_vjp = True
    order = 2

    def value(self, delta: Tensor) -> Tensor:
        """``d(delta)`` [B]."""
        return delta.square().flatten(1).sum(1)

    def derivative(self, delta: Tensor) -> Tensor:
        """``2 delta``."""
        return 2.0 * delta
