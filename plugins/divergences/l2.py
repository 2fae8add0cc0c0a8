"""The squared L2 score distance: SIM's for alpha = 1, and the losses of Score identity Distillation for others."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from rlhf_t2i import plugins


class L2Options(plugins.Options):
    """SiD's alpha."""

    alpha: float = Field(
        1.0, ge=-10, le=10, description="1: SIM and DI*; 0.5: the exact Fisher gradient; 1.2: best in SiD's paper"
    )


class L2(plugins.Divergence):
    """``d(y) = ||y||^2``.

    With alpha the loss is twice SiD's, ``(D_ref - D_psi)^T [(D_ref - x_0) - alpha (D_ref - D_psi)]`` (Zhou et al. 2024,
    arXiv:2404.04057, its generator loss): that of (3.4) plus ``2 (1 - alpha) d(D_psi - D_ref)``.
    """

    Options = L2Options
    options: L2Options
    needs_vjp = True
    order = 2

    def __init__(self, options: L2Options | None = None) -> None:
        super().__init__(options)
        self.path_weight = 2.0 * (1.0 - self.options.alpha)

    def value(self, delta: Tensor) -> Tensor:
        """``d(delta)`` [B]."""
        return delta.square().flatten(1).sum(1)

    def derivative(self, delta: Tensor) -> Tensor:
        """``2 delta``."""
        return 2.0 * delta
