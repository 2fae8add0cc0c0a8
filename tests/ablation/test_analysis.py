"""The ablation's statistics against closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_t2i.tools.ablation.analysis import Bootstrap, Estimate, VariantData, equal_reward
from rlhf_t2i.tools.ablation.schema import Frontier


def row(name, reward, diversity):
    return VariantData(name, {"reward": np.atleast_2d(reward), "diversity": np.atleast_2d(diversity)})


def test_interval_of_one_seed_is_the_prompts_bootstrap():
    values = np.random.default_rng(0).normal(5, 2, size=(1, 200))
    found = Bootstrap({"a": VariantData("a", {"m": values})}).estimate("a", "m")
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(200), rel=0.06)


def test_seeds_widen_the_interval():
    prompts = np.random.default_rng(0).normal(0, 0.01, size=200)
    apart = np.stack([prompts - 1, prompts, prompts + 1])
    found = Bootstrap({"a": VariantData("a", {"m": apart})}).estimate("a", "m")
    # Three seeds one apart: the standard deviation of their resampled mean is sqrt(2/3)/sqrt(3).
    assert found.high - found.low > 1.5


def test_differences_are_paired_over_prompts():
    hard = np.random.default_rng(0).normal(0, 10, size=100)
    rows = {"a": VariantData("a", {"m": hard[None]}), "b": VariantData("b", {"m": hard[None] + 1})}
    found = Bootstrap(rows).difference("b", "a", "m")
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))
    assert found.sign == 1
    assert Bootstrap(rows).estimate("b", "m").sign == 0


def test_equal_reward_reads_the_curves_off_at_the_same_gain():
    noise = np.random.default_rng(0).normal(0, 0.001, size=50)
    rows = {
        "initial": row("initial", noise, 1 + noise),
        # KL: reward 0 to 2 costs diversity 1.0 to 0.6; score: reward 1 to 3 costs 1.0 to 0.8.
        "kl_low": row("kl_low", noise, 1.0 + noise), "kl_high": row("kl_high", 2 + noise, 0.6 + noise),
        "ph_low": row("ph_low", 1 + noise, 1.0 + noise), "ph_high": row("ph_high", 3 + noise, 0.8 + noise),
    }  # fmt: skip
    kl = Frontier(name="KL", rows=["kl_high", "kl_low"])
    score = Frontier(name="score", rows=["ph_low", "ph_high"])
    found = equal_reward(Bootstrap(rows), "initial", score, kl, "reward", "diversity")
    assert [e.gain for e in found] == pytest.approx([1.25, 1.5, 1.75], abs=1e-6)
    middle = found[1]
    assert middle.values == pytest.approx((0.95, 0.7), abs=1e-3)
    assert middle.difference.low < 0.25 < middle.difference.high
    assert middle.difference.sign == 1


def test_frontiers_that_never_meet_are_not_compared():
    rows = {name: row(name, np.full(5, gain), np.ones(5)) for name, gain in
            {"initial": 0.0, "a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}.items()}  # fmt: skip
    pair = Frontier(name="x", rows=["a", "b"]), Frontier(name="y", rows=["c", "d"])
    assert equal_reward(Bootstrap(rows), "initial", *pair, "reward", "diversity") == []


def test_what_has_no_interval():
    boot = Bootstrap({"a": VariantData("a", {"m": np.array([[1.0]]), "fid": np.array([[3.0], [5.0]])})})
    assert math.isnan(boot.estimate("a", "m").low)
    assert boot.estimate("a", "fid").value == 4.0
    assert math.isnan(boot.estimate("a", "absent").value)
    broken = Bootstrap({"a": VariantData("a", {"m": np.array([[1.0, math.nan, 2.0]])})}).estimate("a", "m")
    assert math.isnan(broken.value)
    assert Estimate.of(1.0, np.array([math.nan] * 5 + [1.0])).sign == 0
