"""How training timesteps are drawn: uniform, shifted, logit-normal, truncated to the range, one stream per sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit, logit

from rlhf_t2i.algorithm.schedules import FlowSchedule
from rlhf_t2i.algorithm.timesteps import TimestepLaw, quantile
from tests.math.gaussian import SCHEDULE

LAWS = {
    "uniform": TimestepLaw("uniform"),
    "shifted": TimestepLaw("shifted", shift=3.0),
    "logit_normal": TimestepLaw("logit_normal", mean=-0.5, std=1.3),
}
KEYS = [(11, "generator", step, i) for step in range(40) for i in range(100)]


def scipy_quantile(kind: str, u: np.ndarray) -> np.ndarray:
    if kind == "uniform":
        return stats.uniform.ppf(u)
    if kind == "shifted":  # the image of a uniform variable under s = k u / (1 + (k - 1) u)
        return 3 * u / (1 + 2 * u)
    return expit(stats.norm.ppf(u, -0.5, 1.3))


@pytest.mark.parametrize("kind", LAWS)
def test_quantiles_are_scipys(kind: str) -> None:
    u = torch.linspace(0.0005, 0.9995, 1999, dtype=torch.float64)
    expected = scipy_quantile(kind, u.numpy())
    np.testing.assert_allclose(LAWS[kind].inverse_cdf(u).numpy(), expected, rtol=1e-9)
    torch.testing.assert_close(LAWS[kind].cdf(LAWS[kind].inverse_cdf(u)), u, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(quantile(LAWS[kind], 0.0, 1.0, u).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", LAWS)
def test_truncation_keeps_the_laws_shape_within_the_range(kind: str) -> None:
    law, (low, high) = LAWS[kind], (0.3, 0.55)
    u = torch.linspace(0, 1 - 1e-12, 101, dtype=torch.float64)
    levels = quantile(law, low, high, u)
    assert (levels[0].item(), levels[-1].item()) == (pytest.approx(low), pytest.approx(high))
    ends = law.cdf(torch.tensor([low, high], dtype=torch.float64))
    torch.testing.assert_close((law.cdf(levels) - ends[0]) / (ends[1] - ends[0]), u, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mean", [-10.0, 10.0])
def test_a_range_without_probability_gives_its_nearest_end_and_no_nan(mean: float) -> None:
    levels = quantile(TimestepLaw("logit_normal", mean=mean, std=0.01), 0.4, 0.6, torch.tensor([0.0, 0.5, 0.999]))
    torch.testing.assert_close(levels, torch.full_like(levels, 0.4 if mean < 0 else 0.6))


@pytest.mark.parametrize(("mean", "std"), [(-10, 1.4), (-10, 3), (-5, 0.3), (0, 1), (5, 0.3), (10, 3), (10, 1.4)])
def test_a_range_far_in_the_tail_is_drawn_as_scipy_draws_it(mean: float, std: float) -> None:
    """On both sides of the median, down to the one in a million below which a recipe is refused."""
    u, (low, high) = np.linspace(0.001, 0.999, 99), (0.02, 0.98)
    bounds = (logit(np.array([low, high])) - mean) / std
    expected = expit(stats.truncnorm.ppf(u, *bounds, mean, std))
    levels = quantile(TimestepLaw("logit_normal", mean=mean, std=std), low, high, torch.tensor(u))
    np.testing.assert_allclose(levels.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", [SCHEDULE, FlowSchedule(shift=3.0)], ids=["vp", "flow"])
@pytest.mark.parametrize("kind", [None, *LAWS])
def test_a_draw_is_a_function_of_its_key_alone(kind: str | None, schedule: Any) -> None:
    law = None if kind is None else LAWS[kind]
    together = schedule.sample_timesteps(law, 20, 979, KEYS[:12])
    alone = torch.cat([schedule.sample_timesteps(law, 20, 979, [key]) for key in KEYS[:12]])
    assert torch.equal(together, alone)
    assert torch.equal(schedule.sample_timesteps(law, 20, 979, KEYS[11::-1]), together.flip(0))
    assert len(set(together.tolist())) > 8


@pytest.mark.parametrize("kind", LAWS)
def test_flow_timesteps_follow_the_law(kind: str) -> None:
    t = FlowSchedule().sample_timesteps(LAWS[kind], 20, 980, KEYS)
    assert t.dtype == torch.float64
    ends = LAWS[kind].cdf(torch.tensor([0.02, 0.98], dtype=torch.float64))
    u = (LAWS[kind].cdf(t / 1000) - ends[0]) / (ends[1] - ends[0])
    assert stats.kstest(u.numpy(), "uniform").pvalue > 0.01
    assert 20 <= float(t.min()) < 40
    assert 960 < float(t.max()) <= 980
    assert not bool((t == t.round()).any())


def test_flow_is_shifted_as_the_reference_was_trained() -> None:
    schedule = FlowSchedule(shift=3.0)
    default = schedule.sample_timesteps(None, 20, 980, KEYS[:50])
    assert torch.equal(default, schedule.sample_timesteps(LAWS["shifted"], 20, 980, KEYS[:50]))
    plain = FlowSchedule().sample_timesteps(None, 20, 980, KEYS)
    assert stats.kstest(plain.numpy(), "uniform", args=(20, 960)).pvalue > 0.01
    assert schedule.training_range("assistant") == schedule.training_range("generator") == (20, 980)


@pytest.mark.parametrize("kind", LAWS)
def test_variance_preserving_timesteps_are_integers_of_the_law(kind: str) -> None:
    t = SCHEDULE.sample_timesteps(LAWS[kind], 20, 979, KEYS)
    assert t.dtype == torch.int64
    assert 20 <= int(t.min()) < 40
    assert 960 < int(t.max()) <= 979
    levels = torch.linspace(0.02, 0.979, 60, dtype=torch.float64)
    ends = LAWS[kind].cdf(levels[[0, -1]])
    expected = (LAWS[kind].cdf(levels) - ends[0]) / (ends[1] - ends[0])
    observed = (t.double()[None] <= 1000 * levels[:, None]).double().mean(1)
    # Kolmogorov-Smirnov's 1% bound, and what rounding to thousandths moves.
    assert float((observed - expected).abs().max()) < 1.63 / len(KEYS) ** 0.5 + 2e-3


def test_the_published_algorithm_draws_uniformly() -> None:
    assert SCHEDULE.default_law().kind == "uniform"
    assert SCHEDULE.training_range("generator") == (20, 979)
    assert SCHEDULE.training_range("assistant") == (0, 999)
    t = SCHEDULE.sample_timesteps(None, 20, 21, KEYS[:400])
    assert set(t.tolist()) == {20, 21}
    assert stats.binomtest(int((t == 20).sum()), 400).pvalue > 0.01
