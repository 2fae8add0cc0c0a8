"""The distribution of training timesteps: uniform, shifted, logit-normal (SD3, arXiv 2403.03206)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class TimestepLaw:
    """A distribution of the noise level s in [0, 1].

    Attributes:
        kind: ``uniform``; ``shifted``: ``s = k u / (1 + (k - 1) u)`` for uniform u; ``logit_normal``: ``s`` is the
            sigmoid of a normal variable (arXiv:2403.03206).
        shift: k of ``shifted``.
        mean: Of the normal variable.
        std: Of the normal variable.
    """

    kind: Literal["uniform", "shifted", "logit_normal"]
    shift: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def cdf(self, s: Tensor) -> Tensor:
        """The probability of a level below ``s``, float64."""
        s = s.double()
        if self.kind == "uniform":
            return s
        if self.kind == "shifted":
            return s / (self.shift - (self.shift - 1) * s)
        return torch.special.ndtr((torch.logit(s) - self.mean) / self.std)

    def inverse_cdf(self, u: Tensor) -> Tensor:
        """The level below which the probability is ``u``, float64."""
        u = u.double()
        if self.kind == "uniform":
            return u
        if self.kind == "shifted":
            return self.shift * u / (1 + (self.shift - 1) * u)
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


def quantile(law: TimestepLaw, low: float, high: float, u: Tensor) -> Tensor:
    """Levels s [B] of the law truncated to ``[low, high]``, for uniform ``u`` [B] in [0, 1)."""
    bounds = law.cdf(torch.tensor([low, high], dtype=torch.float64))
    if law.kind == "logit_normal" and float(bounds[0]) > 0.5:
        # A probability near 1 has few digits left for the range: the mirrored law's is near 0, and has all of them.
        mirrored = TimestepLaw("logit_normal", mean=-law.mean, std=law.std)
        return (1 - quantile(mirrored, 1 - high, 1 - low, 1 - u.double())).clamp(low, high)
    if float(bounds[1]) == 0:  # too far from the median even for that
        return torch.full_like(u.double(), high)
    return law.inverse_cdf(bounds[0] + (bounds[1] - bounds[0]) * u.double()).clamp(low, high)


def probability(law: TimestepLaw, low: float, high: float) -> float:
    """How much of the law lies in ``[low, high]``: what :func:`quantile` draws from."""
    below, above = law.cdf(torch.tensor([low, high], dtype=torch.float64)).tolist()
    return float(above - below)
