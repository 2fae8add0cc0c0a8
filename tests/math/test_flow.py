"""The flow-matching schedule: conversions, targets, the time that networks get."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_t2i.algorithm.schedules import FlowSchedule


@settings(max_examples=40, deadline=None, derandomize=True)
@given(t=st.floats(1, 1000), sign=st.sampled_from([1, -1]), seed=st.integers(0, 99))
def test_conversions_agree(t: float, sign: Any, seed: int) -> None:
    """Of an exact velocity: D = x_0, e = eps, s = -eps / g, whatever the network's sign."""
    schedule = FlowSchedule(sign=sign)
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    times, s = torch.full((2,), t, dtype=torch.float64), t / 1000
    x_t = schedule.add_noise(x0, noise, times)
    torch.testing.assert_close(x_t, (1 - s) * x0 + s * noise)
    velocity = schedule.target(x0, noise, times)
    torch.testing.assert_close(velocity, sign * (noise - x0))
    torch.testing.assert_close(schedule.to_x0(velocity, x_t, times), x_t - s * sign * velocity)
    torch.testing.assert_close(schedule.to_x0(velocity, x_t, times), x0, rtol=1e-12, atol=1e-12)
    # Both divide by s, which magnifies rounding near the data.
    torch.testing.assert_close(schedule.noise(x0, x_t, times), noise, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(schedule.score(x0, x_t, times), -noise / s, rtol=1e-9, atol=1e-9)


def test_one_step_from_pure_noise_divides_by_nothing() -> None:
    z, v = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    t = torch.tensor([1000, 1000])
    assert torch.equal(FlowSchedule().to_x0(v, z, t), z - v)
    assert torch.equal(FlowSchedule().add_noise(v, z, t), z)


def test_add_noise_is_diffusers() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = scheduler.timesteps[[0, 300, 999]]
    x0, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(FlowSchedule().add_noise(x0, noise, t), scheduler.scale_noise(x0, t, noise))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("thousandths", [1000.0, 250.5, 1.0]), ("sigma", [1.0, 0.2505, 0.001]), ("one_minus_sigma", [0.0, 0.7495, 0.999])],
)
def test_network_time(kind: Any, expected: list[float]) -> None:
    """1000 s (SD3), s (FLUX, whose class multiplies itself), 1 - s (Z-Image)."""
    time = FlowSchedule(time=kind).network_time(torch.tensor([1000, 250.5, 1.0], dtype=torch.float64))
    assert time.dtype == torch.float32
    torch.testing.assert_close(time, torch.tensor(expected), rtol=1e-7, atol=0)


def test_coefficients_are_at_least_float32() -> None:
    a, g = FlowSchedule().coefficients(torch.tensor([1, 1000]), torch.zeros(2, 4, 8, 8, dtype=torch.bfloat16))
    assert a.dtype == g.dtype == torch.float32
    assert a.shape == (2, 1, 1, 1)
    assert (a[0].item(), g[1].item()) == (pytest.approx(0.999), 1.0)
    assert FlowSchedule().to_x0(
        torch.zeros(2, 3).bfloat16(), torch.ones(2, 3).bfloat16(), torch.tensor([1, 9])
    ).dtype == (torch.float32)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan")])
def test_a_shift_that_is_none_is_refused(shift: float) -> None:
    with pytest.raises(ValueError, match="shift must be positive"):
        FlowSchedule(shift=shift)
