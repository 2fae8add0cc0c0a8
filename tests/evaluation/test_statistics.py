"""Statistics against their definitions, scipy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import linalg
from scipy import stats as scipy_stats

from rlhf_t2i.evaluation import diversity
from rlhf_t2i.utils import stats


def test_bootstrap_interval_agrees_with_scipy_and_theory():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    low, high = stats.bootstrap_interval(values)
    again = scipy_stats.bootstrap(
        (values,), np.mean, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    assert (low, high) == pytest.approx((again.low, again.high), abs=0.01)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert stats.bootstrap_interval(values) == (low, high)


def test_bootstrap_interval_does_not_depend_on_its_slices():
    values = np.random.default_rng(0).normal(size=20_000)
    low, high = stats.bootstrap_interval(values, resamples=600)
    assert low < values.mean() < high


def test_bootstrap_of_too_little():
    assert all(math.isnan(v) for v in stats.bootstrap_interval([1.0]))
    assert all(math.isnan(v) for v in stats.bootstrap_interval([1.0, math.nan]))
    assert stats.bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_vendi_score_of_its_definition():
    # Friedman and Dieng 2023: K for orthogonal samples, 1 for identical ones, exp of the entropy of the cluster sizes.
    assert diversity.vendi_score(np.eye(5)) == pytest.approx(5)
    assert diversity.vendi_score(np.ones((5, 3))) == pytest.approx(1)
    clusters = np.repeat(np.eye(2), [3, 1], axis=0)
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert diversity.vendi_score(clusters) == pytest.approx(expected)
    features = np.random.default_rng(0).normal(size=(6, 4))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    eigenvalues = linalg.eigvalsh(unit @ unit.T / 6)
    assert diversity.vendi_score(features) == pytest.approx(
        math.exp(scipy_stats.entropy(eigenvalues.clip(1e-15))), rel=1e-9
    )


def test_distances_by_hand():
    features = np.array([[1.0, 0], [0, 2.0], [-3.0, 0]])
    assert diversity.cosine_distance(features) == pytest.approx((1 + 2 + 1) / 3)
    pairs = [math.sqrt(5), 4.0, math.sqrt(13)]
    assert diversity.rms_distance(features) == pytest.approx(np.mean(pairs) / math.sqrt(2))


def test_diversity_is_measured_within_prompts():
    # Of a the pairs (0, 1), (0, 3), (1, 3); one image of b; the pair of c.
    features = np.array([[0.0], [1.0], [9.0], [3.0], [7.0], [5.0]])
    found = diversity.within(["a", "a", "b", "a", "c", "c"], features, diversity.rms_distance)
    assert found == pytest.approx([2.0, 2.0])


def test_diversity_of_equal_images_is_nothing():
    alike = np.repeat(np.random.default_rng(0).normal(size=(2, 5)), 3, axis=0)
    units = ["a"] * 3 + ["b"] * 3
    assert diversity.within(units, alike, diversity.cosine_distance) == pytest.approx([0, 0], abs=1e-12)
    assert diversity.within(units, alike, diversity.vendi_score) == pytest.approx([1, 1])


def test_frechet_distance_closed_form_and_scipy():
    rng = np.random.default_rng(0)
    one_dimensional = stats.gaussian_frechet(np.array([1.0]), np.array([[4.0]]), np.array([3.0]), np.array([[9.0]]))
    assert one_dimensional == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)
    a, b = rng.normal(size=(6, 6)), rng.normal(size=(6, 6))
    cov_a, cov_b = a @ a.T, b @ b.T
    gap = rng.normal(size=6)
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = gap @ gap + np.trace(cov_a + cov_b - 2 * root)
    assert stats.gaussian_frechet(gap, cov_a, np.zeros(6), cov_b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_features():
    x = np.random.default_rng(0).normal(size=(50, 3))
    assert stats.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert stats.frechet_distance(x, x + 2) == pytest.approx(12)
    # Fewer samples than features: the covariances are singular, and the distance is finite all the same.
    assert math.isfinite(stats.frechet_distance(np.eye(4)[:2], np.eye(4)[2:]))
    assert math.isnan(stats.frechet_distance(x[:1], x))


def test_entropy():
    assert stats.entropy(np.full(3, 1 / 3)) == pytest.approx(math.log(3))
    assert stats.entropy(np.array([1.0, 0, 0])) == 0.0


def test_ratio_error_by_resampling():
    rng = np.random.default_rng(0)
    before = rng.uniform(1, 2, size=500)
    after = before * rng.normal(0.9, 0.2, size=500)
    kept = stats.ratio(before, after)
    draws = rng.integers(0, 500, size=(2000, 500))
    assert kept.error == pytest.approx((after[draws].mean(1) / before[draws].mean(1)).std(), rel=0.1)


def test_by_unit_needs_a_unit_for_every_value():
    with pytest.raises(ValueError, match="2 values for 1 units"):
        stats.by_unit([1.0, 2.0], ["a"])
