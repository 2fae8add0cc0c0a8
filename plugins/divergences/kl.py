"""The integral Kullback-Leibler divergence of Diff-Instruct and DI++ (algorithm.md 3.1)."""

from __future__ import annotations

from torch import Tensor

from rlhf_t2i import plugins


class KL(plugins.Divergence):
    """The force ``D_assistant - D_reference`` on x_0: no gradient through the denoisers is needed.

    The integrand itself, a log density ratio, is not observable; ``value`` is ``||y||^2 / 2``, whose derivative is
    the force.
    """

    needs_vjp = False
    order = 1

    def value(self, delta: Tensor) -> Tensor:
        """``||delta||^2 / 2`` [B]."""
        return 0.5 * delta.square().flatten(1).sum(1)

    def derivative(self, delta: Tensor) -> Tensor:
        """``delta``."""
        return delta
