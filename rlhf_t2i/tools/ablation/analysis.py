"""Statistics of an ablation: means, differences, comparisons at equal reward and claims, all from one bootstrap.

Prompts are resampled once for all rows (all are measured on the same prompts and noise), seeds within each row: the
crossed bootstrap of Owen (2007), which covers both sources of randomness. Three seeds give a poor estimate of the
spread between seeds; the tables print it beside the interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rlhf_t2i.algorithm import rng
from rlhf_t2i.tools.ablation.schema import Ablation, Claim, Frontier
from rlhf_t2i.utils import stats

RESAMPLES = 4000
LEVELS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of(cls, value: float, draws: np.ndarray | None) -> Estimate:
        """From bootstrap draws [R]; NaN draws are left out, and more than a tenth of them leave no interval."""
        if draws is None or not math.isfinite(value):
            return cls(value)
        finite = draws[np.isfinite(draws)]
        if len(finite) < 0.9 * len(draws):
            return cls(value)
        low, high = np.percentile(finite, [2.5, 97.5])
        return cls(value, float(low), float(high))

    def times(self, factor: float) -> Estimate:
        """In another unit."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)

    @property
    def has_interval(self) -> bool:
        """Whether it has one."""
        return math.isfinite(self.low)

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is on one side of zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass
class VariantData:
    """The measurements of one row: per metric a matrix [S seeds, P prompts]; P = 1 for a number of a whole set."""

    name: str
    values: dict[str, np.ndarray]

    def mean(self, metric: str) -> float:
        """Over seeds and prompts; NaN when unmeasured."""
        return stats.mean(self.values[metric].ravel()).value if metric in self.values else math.nan

    def by_seed(self, metric: str) -> list[float]:
        """One mean per seed."""
        return [stats.mean(row).value for row in self.values.get(metric, ())]


class Bootstrap:
    """Draws of every row's means, paired over prompts.

    Args:
        rows: All measured on the same prompts.
    """

    def __init__(self, rows: Mapping[str, VariantData], resamples: int = RESAMPLES) -> None:
        self.rows, self._resamples = rows, resamples
        self._prompt_weights: dict[int, np.ndarray] = {}
        self._cache: dict[tuple[str, str], np.ndarray | None] = {}

    def draws(self, row: str, metric: str) -> np.ndarray | None:
        """Resampled means [R] of a row; None for a metric without prompts (a Frechet distance) or below two."""
        if (row, metric) not in self._cache:
            self._cache[row, metric] = self._draw(row, metric)
        return self._cache[row, metric]

    def estimate(self, row: str, metric: str) -> Estimate:
        """A row's mean."""
        return Estimate.of(self.rows[row].mean(metric), self.draws(row, metric))

    def difference(self, more: str, less: str, metric: str) -> Estimate:
        """The mean of one row minus another's, paired over prompts."""
        a, b = self.draws(more, metric), self.draws(less, metric)
        value = self.rows[more].mean(metric) - self.rows[less].mean(metric)
        return Estimate.of(value, None if a is None or b is None else a - b)

    def _draw(self, row: str, metric: str) -> np.ndarray | None:
        matrix = self.rows[row].values.get(metric)
        if matrix is None or matrix.shape[1] < 2:
            return None
        seeds, prompts = matrix.shape
        # Seeded by the row alone: all metrics of a row draw the same seeds, so that they stay paired.
        chosen = np.random.default_rng(rng.seed_of("ablation", row)).multinomial(
            seeds, np.full(seeds, 1 / seeds), self._resamples
        )
        return np.einsum("rs,sp,rp->r", chosen / seeds, matrix, self._prompts(prompts), optimize=True)

    def _prompts(self, count: int) -> np.ndarray:
        if count not in self._prompt_weights:
            generator = np.random.default_rng(rng.seed_of("ablation prompts", count))
            counts = generator.multinomial(count, np.full(count, 1 / count), self._resamples)
            self._prompt_weights[count] = counts / count
        return self._prompt_weights[count]


@dataclass(frozen=True)
class EqualReward:
    """Two frontiers compared where both gained the same reward."""

    reward: str
    metric: str
    first: str
    second: str
    gain: float
    """The reward gained over the initial row, in the reward's unit."""
    values: tuple[float, float]
    difference: Estimate
    """First minus second."""


def equal_reward(
    boot: Bootstrap, initial: str, first: Frontier, second: Frontier, reward: str, metric: str
) -> list[EqualReward]:
    """Compare two frontiers at equal reward gained over the initial row.

    Each frontier is a piecewise linear curve through its rows in the order of their reward; the levels are quarters of
    the range that both reach. [] when they share none.
    """
    curves = [_curve(boot, initial, frontier, reward, metric) for frontier in (first, second)]
    low = max(gains[:, 0].min() for gains, _ in curves)
    high = min(gains[:, 0].max() for gains, _ in curves)
    if not low < high:
        return []
    found = []
    for share in LEVELS:
        gain = float(low + share * (high - low))
        a, b = (_read_off(gains, heights, gain) for gains, heights in curves)
        draws = a[1:] - b[1:] if min(len(a), len(b)) > 1 else None
        difference = Estimate.of(float(a[0] - b[0]), draws)
        values = (float(a[0]), float(b[0]))
        found.append(EqualReward(reward, metric, first.name, second.name, gain, values, difference))
    return found


@dataclass(frozen=True)
class Finding:
    """A claim of the paper and what was measured."""

    claim: Claim
    outcome: str
    """``holds``, ``does not hold``, ``not shown``, or ``not measured`` where rows of it are missing."""
    detail: str
    estimates: list[Estimate]


def decide(claim: Claim, ablation: Ablation, boot: Bootstrap) -> Finding:
    """Decide a claim: its whole interval must lie on one side of zero."""
    needed = _rows_of(claim, ablation)
    absent = [name for name in needed if name not in boot.rows]
    if absent:
        return Finding(claim, "not measured", f"these rows were not run: {', '.join(absent)}", [])
    if claim.at_equal is None:
        estimates = [boot.difference(claim.more, claim.less, claim.metric)]
    else:
        frontiers = {frontier.name: frontier for frontier in ablation.frontiers}
        pair = frontiers[claim.more], frontiers[claim.less]
        found = equal_reward(boot, ablation.initial, *pair, claim.at_equal, claim.metric)
        if not found:
            return Finding(claim, "not shown", "the two never gain the same reward, so nothing can be compared", [])
        estimates = [row.difference for row in found]
    factor = ablation.factor(claim.metric)
    detail = "; ".join(_describe(e, factor) for e in estimates)
    if not all(math.isfinite(e.value) for e in estimates):
        return Finding(claim, "not measured", f"{claim.metric} is not a number in a row", estimates)
    signs = {estimate.sign for estimate in estimates}
    outcome = {frozenset({1}): "holds", frozenset({-1}): "does not hold"}.get(frozenset(signs), "not shown")
    return Finding(claim, outcome, f"difference {detail}", estimates)


def _rows_of(claim: Claim, ablation: Ablation) -> list[str]:
    if claim.at_equal is None:
        return [claim.more, claim.less]
    chosen = [frontier for frontier in ablation.frontiers if frontier.name in (claim.more, claim.less)]
    return [ablation.initial, *(name for frontier in chosen for name in frontier.rows)]


def _curve(
    boot: Bootstrap, initial: str, frontier: Frontier, reward: str, metric: str
) -> tuple[np.ndarray, np.ndarray]:
    """Reward gained and metric of a frontier's rows, both [rows, 1 + R]: as measured, then in R draws.

    [rows, 1] where a row has no draws.
    """
    keys = [(initial, reward), *((name, reward) for name in frontier.rows), *((name, metric) for name in frontier.rows)]
    draws = [boot.draws(row, key) for row, key in keys]
    means = np.array([[boot.rows[row].mean(key)] for row, key in keys])
    drawn = [draw for draw in draws if draw is not None]
    values = np.hstack([means, np.stack(drawn)]) if len(drawn) == len(draws) else means
    start, gains, heights = np.split(values, [1, 1 + len(frontier.rows)])
    return gains - start, heights


def _read_off(gains: np.ndarray, heights: np.ndarray, gain: float) -> np.ndarray:
    """Linear interpolation in every column; NaN outside the measured range."""
    found = []
    for x, y in zip(gains.T, heights.T, strict=True):
        order = np.argsort(x, kind="stable")
        found.append(np.interp(gain, x[order], y[order], left=math.nan, right=math.nan))
    return np.array(found)


def _describe(estimate: Estimate, factor: float) -> str:
    scaled = estimate.times(factor)
    interval = f"[{scaled.low:+.4g}, {scaled.high:+.4g}]" if scaled.has_interval else "(no interval)"
    return f"{scaled.value:+.4g} {interval}"
