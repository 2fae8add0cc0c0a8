"""The before/after table: prompts are the independent units, and no failure is dressed up."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation.compare import compare, of_run
from rlhf_t2i.evaluation.results import Metric, Results, read


def evaluation(scores, prompts=None, diversity=(), kind="train", **more):
    prompts = prompts or [f"p{i}" for i in range(len(scores))]
    metrics = {"r": Metric.of_images("r", list(scores), prompts, kind=kind, unit="cosine", **more)}
    if len(diversity):
        metrics["latent_distance"] = Metric.of_prompts("latent_distance", list(diversity))
    return Results(prompts, metrics)


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
    assert changed(-5 * error, kind="eval").verdict == "unseen scorer fell by 5.6 standard errors"
    rng = np.random.default_rng(0)

    def measured(step: int) -> Results:
        prompts, noise = [f"p{i}" for i in range(50)], step * 0.01 * rng.standard_normal(50)
        gains = {"train": 0.5 * step + noise, "eval": -0.5 * step + noise}
        return Results(prompts, {k: Metric.of_images(k, list(v), prompts, kind=k) for k, v in gains.items()})

    assert "reward hacking is likely" in compare(measured(0), measured(1))[1].verdict


def test_a_score_where_lower_is_better_improves_by_falling():
    assert changed(-1.0, higher_is_better=False).outcome == "yes"


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


def test_a_run_whose_prompts_changed_has_no_table(tmp_path):
    """After --allow-recipe-change: a traceback at the end of a finished run would hide its model."""
    for when, prompt in (("before", "a"), ("after", "b")):
        (tmp_path / "evaluation" / when).mkdir(parents=True)
        replace(evaluation([1.0], [prompt]), folder=tmp_path / "evaluation" / when).write()
    measured = of_run(tmp_path / "evaluation")
    assert measured.rows == []
    assert "different prompts" in measured.problem


def test_comparison_of_a_folder(run_folder, tmp_path):
    rows = of_run(run_folder / "evaluation").rows
    assert [(row.key, row.kind) for row in rows] == [
        ("pickscore", "train"), ("clip", "eval"), ("latent_distance", "diversity"),
    ]  # fmt: skip
    assert rows[0].prompts == 6
    assert [row.outcome for row in rows] == ["yes", "yes", "yes"]
    assert "no evaluation of the start" in of_run(tmp_path / "nothing").problem


def test_results_are_read_as_they_were_written(tmp_path):
    written = Results(
        ["a", "a", "b"],
        {
            "r": Metric.of_images("r", [0.1, 0.3, math.nan], ["a", "a", "b"], unit="cosine", higher_is_better=False),
            "fid": Metric("fid", "set", value=3.5),
        },
        groups=["x", "x", "y"], images=["1.png", "2.png", "3.png"], step=7, folder=tmp_path,
    )  # fmt: skip
    written.write()
    found = read(tmp_path)
    assert found is not None
    assert (found.prompts, found.groups, found.images, found.step) == (
        written.prompts, written.groups, written.images, 7,
    )  # fmt: skip
    assert (found.metrics["fid"].value, found.metrics["fid"].by_prompt) == (3.5, [])
    reward = found.metrics["r"]
    assert reward.by_prompt[0] == pytest.approx(0.2)
    assert math.isnan(reward.by_prompt[1])
    assert not reward.higher_is_better
    assert [(row["metric"], row["group"]) for row in found.table] == [("r", ""), ("fid", ""), ("r", "x"), ("r", "y")]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "step"),
        ('{"images": 3, "metrics": {}, "step": 0}', "images"),
        ('{"images": [], "metrics": {"r": 1}, "step": 0}', r"metrics\.r"),
        ('{"images": [], "metrics": {"r": {"by_image": [1.0]}}, "step": 0}', "r: another number of values"),
        ('{"images": [], "metrics": {"r": {"by_prompt": [1.0]}}, "step": 0}', "r: another number of values"),
    ],
)
def test_damaged_results_are_named(text, place, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UsageError, match=rf"results\.json is damaged.*{place}"):
        read(tmp_path)
