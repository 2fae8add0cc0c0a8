"""Identities between writings of the loss: parametrizations, weightings, SiD, reductions (algorithm.md 1.3 to 1.6)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_t2i.algorithm.losses import (
    assistant_loss,
    divergence_loss,
    divergence_loss_from_predictions,
    two_stage_gradient,
    weight,
)
from rlhf_t2i.algorithm.schedules import FlowSchedule, Schedule, VPSchedule
from rlhf_t2i.plugins import registry
from tests.math.gaussian import AT, SCHEDULE, WORLDS

C_SCORE = 0.3
SHAPE = (3, 2, 4, 4)
PATHS = {path: world.schedule for path, world in WORLDS.items()}
both_paths = pytest.mark.parametrize("path", PATHS)


class Smooth:
    """A random smooth field with cross-talk between elements, so that wrong reductions show."""

    def __init__(self, seed: int, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
        self.bias = torch.randn(size, generator=generator, dtype=torch.float64)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x_t.flatten(1) @ self.weight + self.bias).reshape(x_t.shape)


def inputs(batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(batch, *SHAPE[1:], generator=generator, dtype=torch.float64) for _ in range(2))
    return x0.requires_grad_(True), noise


def table(
    schedule: Schedule, form: str, huber: bool, x0: Tensor, t: Tensor, noise: Tensor, psi: Any, ref: Any
) -> Tensor:
    """A row of the table in section 1.6 with w(t) = 1, written in that row's own variables.

    On the flow path v is ``eps - x_0``: ``D = x_t - g v`` has the slope -g in v, as on the variance-preserving one.
    """
    a, g = schedule.coefficients(t, x0)
    flow = isinstance(schedule, FlowSchedule)
    x_t = a * x0 + g * noise
    d_psi, d_ref = psi(x_t, t), ref(x_t, t)
    rows = {
        "score": (lambda d: (a * d - x_t) / g**2, -noise / g, 2 + 0 * a, 1 + 0 * a, 1 + 0 * a),
        "eps": (lambda d: (x_t - a * d) / g, noise, 2 / g**2, 1 / g, g),
        "x0": (lambda d: d, x0, 2 * a**2 / g**4, a / g**2, g**2 / a),
        "v": (
            lambda d: ((1 if flow else a) * x_t - d) / g,
            noise - x0 if flow else a * noise - g * x0,
            2 * a**2 / g**2,
            a / g,
            g / a,
        ),
    }
    read, target, l2_factor, huber_factor, c_factor = rows[form]
    delta, residual = read(d_psi) - read(d_ref), read(d_psi) - target
    if not huber:
        return -(l2_factor * delta * residual).flatten(1).sum(1)
    radius = (delta.square().flatten(1).sum(1).reshape(-1, 1, 1, 1) + (c_factor * C_SCORE) ** 2).sqrt()
    return -(huber_factor * delta / radius * residual).flatten(1).sum(1)


@pytest.mark.parametrize(("path", "t"), [(path, t) for path, t in AT if WORLDS[path].at(t).a > 0])
@pytest.mark.parametrize("form", ["score", "eps", "x0", "v"])
@pytest.mark.parametrize("huber", [False, True])
def test_four_parametrizations_agree(form: str, huber: bool, path: str, t: float) -> None:
    schedule, a, g = PATHS[path], WORLDS[path].at(t).a, WORLDS[path].at(t).g
    divergence = registry.divergence("pseudo_huber", c=g**2 / a * C_SCORE) if huber else registry.divergence("l2")
    psi, ref, times = Smooth(1), Smooth(2), WORLDS[path].tensor(t, 3)
    x0, noise = inputs()
    ours = divergence_loss(divergence, x0, times, noise, psi, ref, schedule, "score")
    theirs = table(schedule, form, huber, x0, times, noise, psi, ref)
    scale = 1e-10 * max(1.0, (a / g**2) ** divergence.order)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=scale)
    torch.testing.assert_close(two_stage_gradient(ours, x0), two_stage_gradient(theirs, x0), rtol=1e-9, atol=10 * scale)


@both_paths
@pytest.mark.parametrize("name", ["l2", "pseudo_huber", "kl"])
def test_weightings_differ_by_their_declared_factor(name: str, path: str) -> None:
    """w(t): score 1, eps g^p, unit_x0 (g^2/a)^p (KL: g^2/a^2), inv_mean_abs 1/mean|x0 - D_ref| in the x0 form."""
    divergence, schedule = registry.divergence(name), PATHS[path]
    times = torch.tensor([20, 499, 979])
    psi, ref = Smooth(1), Smooth(2)
    x0, noise = inputs()
    a, g = (c.reshape(3) for c in schedule.coefficients(times, x0))
    power = divergence.order

    def loss(weighting: Any) -> Tensor:
        return divergence_loss(divergence, x0, times, noise, psi, ref, schedule, weighting).detach()

    score = loss("score")
    to_x0 = g**2 / a**2 if name == "kl" else (g**2 / a) ** power
    torch.testing.assert_close(loss("eps"), score * g**power, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss("unit_x0"), score * to_x0, rtol=1e-12, atol=0)
    mean_abs = (x0 - ref(schedule.add_noise(x0, noise, times), times)).detach().abs().flatten(1).mean(1)
    torch.testing.assert_close(loss("inv_mean_abs"), loss("unit_x0") / mean_abs, rtol=1e-12, atol=0)


def test_weights_carry_no_gradient_and_unknown_ones_are_refused() -> None:
    x0, _ = inputs()
    times = torch.tensor([20, 499, 979])
    divergence = registry.divergence("pseudo_huber")
    for name in ("unit_x0", "inv_mean_abs", "score", "eps"):
        assert not weight(divergence, name, x0, times, x0 * 2, SCHEDULE).requires_grad
    with pytest.raises(ValueError, match="unit_x0, inv_mean_abs, score, eps"):
        weight(divergence, "sigma", x0, times, x0, SCHEDULE)  # type: ignore[arg-type]


def test_inv_mean_abs_is_capped_where_the_reference_is_perfect() -> None:
    x0, _ = inputs()
    times = torch.tensor([20, 499, 979])
    factor = weight(registry.divergence("l2"), "inv_mean_abs", x0, times, x0, SCHEDULE)
    torch.testing.assert_close(factor, torch.full_like(factor, 1e5))


@both_paths
@pytest.mark.parametrize("weighting", ["unit_x0", "inv_mean_abs", "score", "eps"])
@pytest.mark.parametrize("name", ["l2", "pseudo_huber", "kl"])
def test_samples_do_not_mix(name: str, weighting: Any, path: str) -> None:
    """Loss and gradient of a sample are the same alone and in any batch: reductions see one sample only."""
    x0, noise = inputs(batch=5, seed=3)
    times = torch.tensor([20, 100, 499, 700, 979])
    psi, ref = Smooth(1), Smooth(2)
    schedule = PATHS[path]
    together = divergence_loss(name, x0, times, noise, psi, ref, schedule, weighting)
    gradient = two_stage_gradient(together, x0)
    assert together.shape == (5,)
    for i in range(5):
        alone_x0 = x0[i : i + 1].detach().requires_grad_(True)
        alone = divergence_loss(name, alone_x0, times[i : i + 1], noise[i : i + 1], psi, ref, schedule, weighting)
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(two_stage_gradient(alone, alone_x0), gradient[i : i + 1], rtol=1e-10, atol=1e-12)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(scale=st.floats(1e-6, 1e6), c=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_pseudo_huber_norm_is_per_sample_and_bounded(scale: float, c: float, seed: int) -> None:
    huber = registry.divergence("pseudo_huber", c=c)
    delta = scale * torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    slope = huber.derivative(delta)
    norms = slope.flatten(1).norm(dim=1)
    # Pull is at most one, in the direction of the residual, and equals ||y|| / sqrt(||y||^2 + c^2) of that sample.
    size = delta.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, size / (size**2 + c**2).sqrt(), rtol=1e-10, atol=0)
    assert bool((norms <= 1 + 1e-12).all())
    louder = delta.clone()
    louder[1:] *= 1000
    torch.testing.assert_close(huber.derivative(louder)[0], slope[0], rtol=0, atol=0)
    assert bool((huber.value(delta) >= 0).all())
    # derivative() is the gradient of value().
    leaf = delta.clone().requires_grad_(True)
    torch.testing.assert_close(torch.autograd.grad(huber.value(leaf).sum(), leaf)[0], slope, rtol=1e-9, atol=1e-12)


def test_c_rel_scales_with_the_square_root_of_the_dimension() -> None:
    relative = registry.divergence("pseudo_huber", c_rel=0.01)
    for shape in ((2, 4, 8, 8), (2, 4, 16, 16)):
        delta = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        absolute = registry.divergence("pseudo_huber", c=0.01 * delta[0].numel() ** 0.5)
        torch.testing.assert_close(relative.derivative(delta), absolute.derivative(delta), rtol=1e-12, atol=0)
    # SDXL: 5.4e-4 sqrt(4 * 128 * 128) = 0.138 (algorithm.md 1.6).
    zero = torch.zeros(1, 4, 128, 128, dtype=torch.float64)
    zero[0, 0, 0, 0] = 1.0
    c = 0.138240
    assert registry.divergence("pseudo_huber").value(zero).item() == pytest.approx((1 + c * c) ** 0.5 - c, rel=1e-6)


def test_two_stage_backward_equals_the_direct_one() -> None:
    """Through a generator with parameters; assistant and reference collect no parameter gradient."""
    torch.manual_seed(0)
    make = lambda: torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6)).double()  # noqa: E731
    generator, psi, ref = make(), make(), make()
    z, noise = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    times = torch.tensor([20, 100, 499, 700, 979])

    def loss(x0: Tensor) -> Tensor:
        return divergence_loss(
            "pseudo_huber", x0, times, noise, lambda x, t: psi(x), lambda x, t: ref(x), SCHEDULE
        ) - 100 * torch.sin(x0).mean(1)

    direct = torch.autograd.grad(loss(generator(z)).mean(), list(generator.parameters()))
    x0 = generator(z)
    leaf = x0.detach().requires_grad_(True)
    x0.backward(two_stage_gradient(loss(leaf), leaf) / len(z))
    for expected_gradient, parameter in zip(direct, generator.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected_gradient, rtol=1e-12, atol=1e-14)
    assert all(p.grad is None for net in (psi, ref) for p in net.parameters())


def test_kl_surrogate_stops_gradients_of_live_predictions() -> None:
    """Forgetting sg[...] would change the force (algorithm.md 3.1)."""
    x0, noise = inputs()
    times = torch.tensor([20, 499, 979])
    x_t = SCHEDULE.add_noise(x0, noise, times)
    d_psi, d_ref = Smooth(1)(x_t, times), Smooth(2)(x_t, times)
    loss = divergence_loss_from_predictions(registry.divergence("kl"), x0, times, d_psi, d_ref, SCHEDULE)
    torch.testing.assert_close(two_stage_gradient(loss, x0), (d_psi - d_ref).detach(), rtol=0, atol=0)


def test_two_stage_gradient_refuses_a_loss_without_x0() -> None:
    x0, _ = inputs()
    with pytest.raises(RuntimeError):
        two_stage_gradient(torch.ones(3), x0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "velocity", "minus velocity"])
def test_assistant_loss_is_the_mean_squared_error_of_the_target(kind: str) -> None:
    """Whatever the network predicts is what it is trained to predict; of noise, lambda(t) = g^2."""
    schedule: Schedule = (
        FlowSchedule(sign=-1 if kind.startswith("minus") else 1)
        if "velocity" in kind
        else VPSchedule(SCHEDULE.alphas_cumprod, kind)
    )
    times = torch.tensor([20, 499, 979])
    x0, noise = (value.detach() for value in inputs())
    a, g = schedule.coefficients(times, x0)
    perfect = {
        "epsilon": noise,
        "v_prediction": a * noise - g * x0,
        "sample": x0,
        "velocity": noise - x0,
        "minus velocity": x0 - noise,
    }[kind]
    zero, quarter = torch.zeros(3, dtype=torch.float64), torch.full((3,), 0.25, dtype=torch.float64)
    torch.testing.assert_close(assistant_loss(perfect, x0, noise, times, schedule), zero, rtol=0, atol=1e-20)
    torch.testing.assert_close(assistant_loss(perfect + 0.5, x0, noise, times, schedule), quarter)


def test_losses_stay_in_float32_for_half_precision_latents() -> None:
    x0 = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16).requires_grad_(True)
    times = torch.tensor([20, 499])
    loss = divergence_loss("l2", x0, times, torch.randn(2, 4, 8, 8), lambda x, t: x * 0.9, lambda x, t: x, SCHEDULE)
    assert loss.dtype == torch.float32
