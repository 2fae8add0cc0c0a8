"""The statistics of an evaluation: intervals, paired differences and the Frechet distance.

Prompts are the independent units everywhere: several images of one prompt share its difficulty, so they are averaged
before any spread is taken. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """A mean over prompts, its standard error and the number of prompts; the error is nan for one prompt."""

    value: float
    error: float
    prompts: int

    @property
    def t_statistic(self) -> float:
        """The mean in standard errors: 0 for an exact zero, infinite for a spread-free mean that is not."""
        if self.value == 0:
            return 0.0
        return self.value / self.error if self.error else math.copysign(math.inf, self.value)


def by_unit(values: Sequence[float] | Array, units: Sequence[Hashable]) -> Array:
    """Average the values [N] of each unit (a prompt): [P], in order of first appearance.

    Raises:
        ValueError: Values and units differ in number.
    """
    if len(values) != len(units):
        raise ValueError(f"{len(values)} values for {len(units)} units")
    order = {unit: index for index, unit in enumerate(dict.fromkeys(units))}
    index = np.array([order[unit] for unit in units], dtype=np.int64)
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64), minlength=len(order))
    return sums / np.bincount(index, minlength=len(order))


def mean(units: Sequence[float] | Array) -> Mean:
    """Mean and standard error of independent units [P] (one value per prompt)."""
    units = np.asarray(units, dtype=np.float64)
    if not len(units):
        return Mean(math.nan, math.nan, 0)
    # A constant's standard deviation must be 0, not the rounding error of its mean.
    constant = bool((units == units[0]).all())
    value = float(units[0]) if constant else float(units.mean())
    if len(units) < 2:
        return Mean(value, math.nan, 1)
    return Mean(value, 0.0 if constant else float(units.std(ddof=1) / math.sqrt(len(units))), len(units))


def paired(before: Sequence[float] | Array, after: Sequence[float] | Array) -> Mean:
    """Mean difference ``after - before`` of the same units [P] and its standard error."""
    return mean(np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64))


def ratio(before: Sequence[float] | Array, after: Sequence[float] | Array) -> Mean:
    """``mean(after) / mean(before)`` of the same units, with the delta method's standard error."""
    before, after = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    base = float(before.mean()) if len(before) else 0.0
    if base == 0:
        return Mean(math.nan, math.nan, len(before))
    value = float(after.mean()) / base
    return Mean(value, mean((after - value * before) / base).error, len(before))


def bootstrap_interval(
    units: Sequence[float] | Array, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of independent units [P] (Efron 1979), the same for the same seed.

    Resampled in slices so that memory stays below 80 MB whatever the number of units. ``(nan, nan)`` below two units.
    """
    units = np.asarray(units, dtype=np.float64)
    if len(units) < 2 or not np.isfinite(units).all():
        return math.nan, math.nan
    if (units == units[0]).all():
        return float(units[0]), float(units[0])
    from scipy.stats import bootstrap

    result = bootstrap(
        (units,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        method="percentile",
        batch=max(1, 10_000_000 // len(units)),
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def entropy(probabilities: Array) -> float:
    """Shannon entropy in nats of a distribution [C]; ``ln C`` when every class is equally likely."""
    p = np.asarray(probabilities, dtype=np.float64)
    p = p[p > 0]
    return float(-(p * np.log(p)).sum()) + 0.0


def gaussian_frechet(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """Squared Frechet distance ``|m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)`` of two Gaussians.

    The symmetric form needs only symmetric eigenvalue problems, so no complex rounding dust has to be cut off
    (Dowson and Landau 1982).
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = root @ cov_b @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None)).sum()
    gap = np.asarray(mean_a) - np.asarray(mean_b)
    return float(max(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross, 0.0))


def frechet_distance(features_a: Array, features_b: Array) -> float:
    """Squared Frechet distance of Gaussians fitted to features [N, D] and [M, D], N and M at least 2."""
    if len(features_a) < 2 or len(features_b) < 2:
        return math.nan
    a, b = np.asarray(features_a, dtype=np.float64), np.asarray(features_b, dtype=np.float64)
    return gaussian_frechet(
        a.mean(0), np.atleast_2d(np.cov(a, rowvar=False)), b.mean(0), np.atleast_2d(np.cov(b, rowvar=False))
    )
