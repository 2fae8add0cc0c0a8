"""Two evaluations of the same prompts and noise: paired differences over prompts, and the verdict on each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_t2i.evaluation import results
from rlhf_t2i.evaluation.results import Kind, Metric, Results
from rlhf_t2i.utils import stats

Outcome = Literal["yes", "no", "unclear"]
ENOUGH = 3.0
"""Standard errors that a trained reward must gain."""
NOISE = 2.0
"""Standard errors within which a change is called noise."""
KEPT = 0.8
"""The share of diversity that must remain."""


@dataclass(frozen=True)
class Comparison:
    """One quantity before and after, on the same prompts and noise.

    Attributes:
        key: The metric's label.
        kind: See :data:`~rlhf_t2i.evaluation.results.Kind`.
        unit: Of the values.
        before: The mean before.
        after: The mean after.
        difference: After minus before.
        error: Standard error of the paired difference (of the ratio, for diversity); prompts are the units.
        errors: The difference in standard errors; for diversity the distance of the ratio from :data:`KEPT`.
        ratio: After over before.
        prompts: How many were compared.
        outcome: The verdict.
        verdict: The verdict in words.
    """

    key: str
    kind: Kind
    unit: str
    before: float
    after: float
    difference: float
    error: float
    errors: float
    ratio: float
    prompts: int
    outcome: Outcome
    verdict: str


@dataclass(frozen=True)
class BeforeAfter:
    """A run's two evaluations.

    Attributes:
        before: Of the start; None where it has not been made.
        after: Of the end.
        rows: The table: trained rewards, unseen scorers, diversity. Empty where ``problem`` says why.
        problem: Why the two cannot be compared, as a sentence.
    """

    before: Results | None
    after: Results | None
    rows: list[Comparison]
    problem: str = ""


def of_run(evaluation: Path) -> BeforeAfter:
    """Read what a run measured before and after training.

    Args:
        evaluation: The folder ``evaluation`` of a run, whether or not anything is there yet.

    Raises:
        UsageError: One of them is damaged.
    """
    before, after = (results.read(evaluation / when) for when in ("before", "after"))
    if before is None:
        return BeforeAfter(None, after, [], "This run holds no evaluation of the start yet.")
    if after is None:
        missing = "This run is not finished: there is no evaluation of its end to compare with the start."
        return BeforeAfter(before, None, [], missing)
    try:
        return BeforeAfter(before, after, compare(before, after))
    except ValueError as error:
        return BeforeAfter(before, after, [], f"No comparison: {error}.")


def compare(before: Results, after: Results) -> list[Comparison]:
    """Compare every metric that both evaluations have by prompt.

    Raises:
        ValueError: The prompts differ, so nothing can be paired.
    """
    if before.units != after.units:
        raise ValueError("before and after were measured on different prompts: they cannot be paired")
    pairs = [(before.metrics[key], metric) for key, metric in after.metrics.items() if key in before.metrics]
    pairs.sort(key=lambda pair: ("train", "eval", "diversity", "set").index(pair[1].kind))
    trains = any(after.kind == "train" for _, after in pairs)
    return [
        _diversity(before, after) if after.kind == "diversity" else _reward(before, after, trains)
        for before, after in pairs
        if before.by_prompt and len(before.by_prompt) == len(after.by_prompt)
    ]


def _reward(before: Metric, after: Metric, trains: bool) -> Comparison:
    change = stats.paired(before.by_prompt, after.by_prompt)
    errors = change.t_statistic if after.higher_is_better else -change.t_statistic
    outcome: Outcome
    if not math.isfinite(change.value):
        outcome, verdict = "no", "not a number: the scores hold NaN or infinity"
    elif math.isnan(errors):
        outcome, verdict = "unclear", "one prompt gives no standard error: measure more prompts"
    else:
        outcome, verdict = _trained(errors) if after.kind == "train" else _unseen(errors, trains)
    return Comparison(
        after.key, after.kind, after.unit, before.value, after.value, change.value, change.error, change.t_statistic,
        after.value / before.value if before.value else math.nan, change.prompts, outcome, verdict,
    )  # fmt: skip


def _trained(errors: float) -> tuple[Outcome, str]:
    if errors > ENOUGH:
        return "yes", f"improved by more than {ENOUGH:.0f} standard errors ({_times(errors)})"
    if errors > NOISE:
        return "no", f"improved, but by {_times(errors)} standard errors, not more than {ENOUGH:.0f}"
    if errors >= -NOISE:
        return "no", f"no improvement beyond noise ({_times(errors)} standard errors)"
    return "no", f"got worse by {_times(-errors)} standard errors"


def _unseen(errors: float, trains: bool) -> tuple[Outcome, str]:
    if errors >= 0:
        return "yes", f"unseen scorer did not fall ({errors:+.1f} standard errors)"
    if errors >= -NOISE:
        return "unclear", f"unseen scorer fell a little, within noise ({errors:+.1f} standard errors)"
    suspicion = ": reward hacking is likely" if trains else ""  # without a reward nothing can be hacked
    return "no", f"unseen scorer fell by {_times(-errors)} standard errors{suspicion}"


def _diversity(before: Metric, after: Metric) -> Comparison:
    kept = stats.ratio(before.by_prompt, after.by_prompt)
    above = stats.Mean(kept.value - KEPT, kept.error, kept.prompts).t_statistic
    spread = "" if math.isnan(kept.error) else f" ± {kept.error:.1%}"
    outcome: Outcome = "yes"
    if not math.isfinite(kept.value):
        outcome, verdict = "unclear", "diversity was zero or unmeasured at the start: no ratio"
    elif kept.value >= KEPT:
        verdict = f"diversity kept {kept.value:.0%}{spread}"
    else:
        outcome, verdict = "no", f"diversity fell to {kept.value:.0%}{spread} of the start, below {KEPT:.0%}"
    return Comparison(
        after.key, after.kind, after.unit, before.value, after.value, after.value - before.value, kept.error, above,
        kept.value, kept.prompts, outcome, verdict,
    )  # fmt: skip


def _times(errors: float) -> str:
    return "no spread at all" if math.isinf(errors) else f"{errors:.1f}"
