"""The before/after table: prompts are the independent units, and no failure is dressed up."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rlhf_t2i.evaluation.compare import compare
from rlhf_t2i.evaluation.reading import Evaluated
from rlhf_t2i.tools.report import comparison, verdicts


def evaluation(scores, prompts=None, diversity=(), kind="train", **more):
    prompts = prompts or [f"p{i}" for i in range(len(scores))]
    return Evaluated(
        0, prompts, {"r": list(scores)}, {"r": kind}, {"r": "cosine"},
        {"latent_distance": list(diversity)} if len(diversity) else {}, **more,
    )  # fmt: skip


def test_paired_difference_matches_scipy():
    rng = np.random.default_rng(0)
    before, gain = rng.normal(size=40), rng.normal(0.3, 0.5, size=40)
    (row,) = compare(evaluation(before), evaluation(before + gain))
    assert row.errors == pytest.approx(stats.ttest_rel(before + gain, before).statistic, rel=1e-12)
    assert row.difference == pytest.approx(gain.mean())


def test_images_of_one_prompt_are_not_independent():
    # Ten copies of the same image add no evidence: the error must be that of two prompts, not of twenty images.
    prompts = ["a"] * 10 + ["b"] * 10
    before, after = [0.0] * 20, [1.0] * 10 + [2.6] * 10
    (row,) = compare(evaluation(before, prompts), evaluation(after, prompts))
    assert row.prompts == 2
    assert row.error == pytest.approx(0.8)
    assert row.errors == pytest.approx(2.25)
    assert row.outcome == "no"
    assert "not more than 3" in row.verdict


def changed(mean, spread=0.01, n=50, kind="train", **more):
    gain = mean + spread * np.random.default_rng(1).standard_normal(n)
    gain += mean - gain.mean()
    return compare(evaluation(np.zeros(n), kind=kind, **more), evaluation(gain, kind=kind, **more))[0]


def test_trained_reward_wording():
    error = 0.01 / math.sqrt(50)
    assert changed(10 * error).outcome == "yes"
    assert "no improvement beyond noise" in changed(0.2 * error).verdict
    assert "no improvement beyond noise" in changed(-1.0 * error).verdict
    assert changed(-9 * error).verdict.startswith("got worse")
    assert changed(-9 * error).outcome == "no"


def test_unseen_scorer_wording():
    error = 0.01 / math.sqrt(50)
    assert changed(0.5 * error, kind="eval").outcome == "yes"
    slight = changed(-1.0 * error, kind="eval")
    assert (slight.outcome, "within noise" in slight.verdict) == ("unclear", True)
    assert "reward hacking" in changed(-5 * error, kind="eval").verdict


def test_a_score_where_lower_is_better_improves_by_falling():
    assert changed(-1.0, higher_is_better={"r": False}).outcome == "yes"


@pytest.mark.parametrize(("after", "outcome"), [([0.9, 0.7], "yes"), ([0.5, 0.6], "no")])
def test_diversity_keeps_eighty_percent(after, outcome):
    rows = compare(evaluation([1.0, 2.0], diversity=[1, 1]), evaluation([1.0, 2.0], diversity=after))
    assert rows[1].ratio == pytest.approx(np.mean(after))
    assert rows[1].outcome == outcome


def test_degenerate_evaluations():
    (same,) = compare(evaluation([1.0, 2.0]), evaluation([1.0, 2.0]))
    assert (same.errors, same.outcome) == (0.0, "no")
    (single,) = compare(evaluation([1.0]), evaluation([2.0]))
    assert (math.isnan(single.error), single.outcome) == (True, "unclear")
    (broken,) = compare(evaluation([1.0, 2.0]), evaluation([math.nan, 2.0]))
    assert (broken.outcome, "not a number" in broken.verdict) == ("no", True)
    zero = compare(evaluation([1.0, 2.0], diversity=[0, 0]), evaluation([1.0, 2.0], diversity=[0, 0]))[1]
    assert zero.outcome == "unclear"


def test_different_prompts_cannot_be_paired():
    with pytest.raises(ValueError, match="different prompts"):
        compare(evaluation([1.0], ["a"]), evaluation([1.0], ["b"]))


def test_comparison_of_a_folder(run_folder, tmp_path):
    rows = comparison(run_folder)
    assert [(row.key, row.kind) for row in rows] == [
        ("pickscore", "train"), ("clip", "eval"), ("latent_distance", "diversity"),
    ]  # fmt: skip
    assert rows[0].prompts == 6
    assert [v.outcome for v in verdicts(rows)] == ["yes", "yes", "yes"]
    assert comparison(tmp_path / "nothing") == []
