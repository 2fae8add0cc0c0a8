"""The noise schedule: constants of algorithm.md section 0, conversions, and reading diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_t2i.algorithm.schedules import PREDICTION_TYPES, VPSchedule
from tests.math.gaussian import SCHEDULE, golden

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
# t: abar, a, g, g/a, a/g^2
TABLE = {
    20: (0.981314, 0.990613, 0.136696, 0.1380, 53.01),
    99: (0.895462, 0.946289, 0.323323, 0.3417, 9.052),
    249: (0.675432, 0.821847, 0.569709, 0.6932, 2.532),
    399: (0.426086, 0.652753, 0.757571, 1.1606, 1.137),
    499: (0.277669, 0.526943, 0.849900, 1.6129, 0.7295),
    749: (0.056623, 0.237957, 0.971276, 4.0817, 0.2522),
    979: (0.005913, 0.076895, 0.997039, 12.966, 0.0774),
}


@pytest.mark.parametrize(("t", "row"), TABLE.items())
def test_constants(t: int, row: tuple[float, ...]) -> None:
    schedule = VPSchedule.from_config(diffusers.DDIMScheduler(**SDXL).config)
    a, g = (c.item() for c in schedule.coefficients(torch.tensor([t]), torch.zeros(1, dtype=torch.float64)))
    found = (schedule.alphas_cumprod[t].item(), a, g, g / a, a / g**2)
    # The table's last digit comes from float32 (g at t = 20 is .1366954, printed .136696).
    assert found == pytest.approx(row, rel=7e-4, abs=0)
    assert found[:3] == pytest.approx(row[:3], rel=0, abs=1e-6)
    assert a == pytest.approx(golden()[str(t)]["alpha"], abs=1e-14)
    assert g == pytest.approx(golden()[str(t)]["sigma"], abs=1e-14)


SCHEDULERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_from_scheduler_reads_the_training_schedule(name: str, kind: str) -> None:
    scheduler = getattr(diffusers, name)(**{**SDXL, "beta_schedule": kind})
    schedule = VPSchedule.from_config(scheduler.config)
    assert len(schedule) == 1000
    assert schedule.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(schedule.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=2e-5, atol=1e-7)
    if kind == "scaled_linear":
        torch.testing.assert_close(schedule.alphas_cumprod, SCHEDULE.alphas_cumprod, rtol=1e-14, atol=0)


def test_from_scheduler_agrees_before_and_after_setting_sampling_steps() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**SDXL)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(VPSchedule.from_config(scheduler.config).alphas_cumprod, SCHEDULE.alphas_cumprod)


def test_from_scheduler_reads_prediction_type_and_trained_betas() -> None:
    betas = torch.linspace(0.001, 0.02, 50).tolist()
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50, trained_betas=betas, prediction_type="v_prediction")
    schedule = VPSchedule.from_config(scheduler.config)
    assert schedule.prediction_type == "v_prediction"
    torch.testing.assert_close(schedule.alphas_cumprod.float(), scheduler.alphas_cumprod)


def test_add_noise_is_diffusers() -> None:
    x0, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    t = torch.tensor([0, 20, 499, 999])
    theirs = diffusers.DDIMScheduler(**SDXL).add_noise(x0, noise, t)
    torch.testing.assert_close(SCHEDULE.add_noise(x0, noise, t), theirs, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(t=st.integers(0, 999), kind=st.sampled_from(PREDICTION_TYPES), seed=st.integers(0, 99))
def test_parametrizations_agree(t: int, kind: str, seed: int) -> None:
    """Of exact predictions: D = x0, e = eps, s = -eps / g, whatever the network predicts."""
    schedule = VPSchedule(SCHEDULE.alphas_cumprod, kind)
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    times = torch.full((2,), t)
    a, g = schedule.coefficients(times, x0)
    x_t = schedule.add_noise(x0, noise, times)
    prediction = {"epsilon": noise, "v_prediction": a * noise - g * x0, "sample": x0}[kind]
    torch.testing.assert_close(schedule.to_x0(prediction, x_t, times), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.noise(x0, x_t, times), noise, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.target(x0, noise, times), prediction, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.score(x0, x_t, times), -noise / g, rtol=1e-9, atol=1e-8)


def test_coefficients_are_at_least_float32() -> None:
    a, g = SCHEDULE.coefficients(torch.tensor([0, 999]), torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16))
    assert a.dtype == g.dtype == torch.float32
    assert a.shape == (2, 1, 1, 1)
    assert g[0].item() == pytest.approx(0.00085**0.5, rel=1e-6)


@pytest.mark.parametrize(
    "alphas",
    [[], [0.5, 0.5], [0.2, 0.9], [1.0, 0.5], [0.0], [0.5, -0.1], [[0.9, 0.8]], [0.9, float("nan")]],
)
def test_what_is_no_schedule_is_refused(alphas: Any) -> None:
    with pytest.raises(ValueError, match="strictly decreasing"):
        VPSchedule(torch.tensor(alphas))


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample"):
        VPSchedule(SCHEDULE.alphas_cumprod, "flow")
    with pytest.raises(ValueError, match="squaredcos"):
        VPSchedule.from_config(diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").config)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_zero_terminal_snr_leaves_out_the_last_timestep(kind: str) -> None:
    """As diffusers rescales it (arXiv:2305.08891); at the last timestep there is no signal left to predict from."""
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    schedule = VPSchedule.from_config({**SDXL, "rescale_betas_zero_snr": True, "prediction_type": kind})
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=1e-10, atol=1e-15)
    assert (schedule.first, schedule.last) == (0, 998)
    assert schedule.training_range("assistant") == (0, 998)
    x0, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    t = torch.tensor([0, 998])
    x_t = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(schedule.to_x0(schedule.target(x0, noise, t), x_t, t), x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [50, 500, 1000, 4000])
def test_thousandths_cover_every_number_of_training_timesteps(steps: int) -> None:
    schedule = VPSchedule.from_config({**SDXL, "num_train_timesteps": steps})
    indices = schedule.index(torch.arange(int(schedule.first), int(schedule.last) + 1))
    assert (indices[0], indices[-1]) == (0, steps - max(1, steps // 1000))
    assert bool((indices.diff() >= 0).all())
