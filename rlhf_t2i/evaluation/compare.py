"""The before/after table of a run: paired differences over prompts, and what may be said about them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_t2i.evaluation.reading import Evaluated, evaluated
from rlhf_t2i.utils import stats

Outcome = Literal["yes", "no", "unclear"]
ENOUGH = 3.0
"""Standard errors a trained reward must gain."""
NOISE = 2.0
"""Standard errors within which a change is called noise."""
KEPT = 0.8
"""The share of diversity that must stay."""


@dataclass(frozen=True)
class Row:
    """One measured quantity before and after training, on the same prompts and noise."""

    key: str
    kind: Literal["train", "eval", "diversity"]
    unit: str
    before: float
    after: float
    difference: float
    error: float
    """Standard error of the paired difference (of the ratio, for diversity), prompts as the independent units."""
    errors: float
    """The difference in standard errors; for diversity how far the ratio is above :data:`KEPT`."""
    ratio: float
    prompts: int
    outcome: Outcome
    verdict: str


@dataclass(frozen=True)
class Verdict:
    """One criterion of a run, as a sentence."""

    outcome: Outcome
    text: str


def comparison(out: Path) -> list[Row]:
    """The table of a run folder: trained rewards, then unseen scorers, then diversity; [] before both are there."""
    before = evaluated(Path(out) / "evaluation" / "before.json")
    after = evaluated(Path(out) / "evaluation" / "after.json")
    return [] if before is None or after is None else compare(before, after)


def compare(before: Evaluated, after: Evaluated) -> list[Row]:
    """The table of two evaluations.

    Raises:
        ValueError: The prompts differ, so nothing can be paired.
    """
    if before.prompts != after.prompts:
        raise ValueError("before and after were measured on different prompts: they cannot be paired")
    keys = [key for key in before.scores if key in after.scores]
    keys.sort(key=lambda key: _kind(after, key) != "train")
    rows = [_reward_row(key, before, after) for key in keys]
    measures = [key for key in before.diversity if key in after.diversity]
    return rows + [_diversity_row(key, before.diversity[key], after.diversity[key]) for key in measures]


def verdicts(rows: list[Row]) -> list[Verdict]:
    """The criteria of a run, one sentence each."""
    return [Verdict(row.outcome, f"{row.key}: {row.verdict}") for row in rows]


def _kind(evaluation: Evaluated, key: str) -> Literal["train", "eval"]:
    return "train" if evaluation.kinds.get(key, "train") == "train" else "eval"


def _reward_row(key: str, before: Evaluated, after: Evaluated) -> Row:
    old = stats.by_prompt(before.scores[key], before.prompts)
    new = stats.by_prompt(after.scores[key], after.prompts)
    change = stats.paired(old, new)
    sign = 1.0 if after.higher_is_better.get(key, True) else -1.0
    kind = _kind(after, key)
    judge = _trained if kind == "train" else _unseen
    outcome, verdict = judge(sign * change.t_statistic, change)
    means = stats.mean(old).value, stats.mean(new).value
    return Row(
        key, kind, after.units.get(key, ""), *means, change.value, change.error, change.t_statistic,
        means[1] / means[0] if means[0] else math.nan, change.prompts, outcome, verdict,
    )  # fmt: skip


def _trained(errors: float, change: stats.Mean) -> tuple[Outcome, str]:
    if not math.isfinite(change.value):
        return "no", "not a number: the scores hold NaN or infinity"
    if math.isnan(errors):
        return "unclear", "one prompt gives no standard error: measure more prompts"
    if errors > ENOUGH:
        return "yes", f"improved by more than {ENOUGH:.0f} standard errors ({_times(errors)})"
    if errors > NOISE:
        return "no", f"improved, but by {_times(errors)} standard errors, not more than {ENOUGH:.0f}"
    if errors >= -NOISE:
        return "no", f"no improvement beyond noise ({_times(errors)} standard errors)"
    return "no", f"got worse by {_times(-errors)} standard errors"


def _unseen(errors: float, change: stats.Mean) -> tuple[Outcome, str]:
    if not math.isfinite(change.value):
        return "no", "not a number: the scores hold NaN or infinity"
    if math.isnan(errors):
        return "unclear", "one prompt gives no standard error: measure more prompts"
    if errors >= 0:
        return "yes", f"unseen scorer did not fall ({errors:+.1f} standard errors)"
    if errors >= -NOISE:
        return "unclear", f"unseen scorer fell a little, within noise ({errors:+.1f} standard errors)"
    return "no", f"unseen scorer fell by {_times(-errors)} standard errors: reward hacking is likely"


def _diversity_row(key: str, old: list[float], new: list[float]) -> Row:
    kept = stats.ratio(old, new)
    before, after = stats.mean(old).value, stats.mean(new).value
    above = stats.Mean(kept.value - KEPT, kept.error, kept.prompts).t_statistic
    outcome, verdict = _kept(kept)
    return Row(
        key, "diversity", "", before, after, after - before, kept.error, above, kept.value, kept.prompts, outcome,
        verdict,
    )  # fmt: skip


def _kept(kept: stats.Mean) -> tuple[Outcome, str]:
    if not math.isfinite(kept.value):
        return "unclear", "diversity was zero or unmeasured at the start: no ratio"
    spread = "" if math.isnan(kept.error) else f" ± {kept.error:.1%}"
    if kept.value >= KEPT:
        return "yes", f"diversity kept {kept.value:.0%}{spread}"
    return "no", f"diversity fell to {kept.value:.0%}{spread} of the start, below {KEPT:.0%}"


def _times(errors: float) -> str:
    return "no spread at all" if math.isinf(errors) else f"{errors:.1f}"
