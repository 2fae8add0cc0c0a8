"""Classifier-free guidance: Theorem 3.2, and when Choice 1 and Choice 2 coincide (algorithm.md 1.5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_t2i.algorithm.losses import (
    divergence_loss,
    divergence_loss_from_predictions,
    guidance_omega,
    guided,
    implicit_cfg_loss,
    outer_divergence_loss,
    two_stage_gradient,
)
from rlhf_t2i.plugins import registry
from tests.math.gaussian import AT, MU, WORLDS, S, World
from tests.math.test_forms import PATHS, Smooth, both_paths, inputs

# p_ref(.|c) = N(.5, .8^2), p_ref(.|0) = N(-.2, 1.4^2)
CONDITIONAL, UNCONDITIONAL = (0.5, 0.8), (-0.2, 1.4)


def cfg_gradient(world: World, t: float) -> tuple[float, float]:
    def loss(x0: Tensor, times: Tensor, eps: Tensor) -> Tensor:
        x_t = world.schedule.add_noise(x0, eps, times)
        predictions = world.denoiser(*CONDITIONAL)(x_t, times), world.denoiser(*UNCONDITIONAL)(x_t, times)
        return implicit_cfg_loss(x0, times, *predictions, world.schedule, "score")

    return world.expected(loss, MU, S, t)[1]


@pytest.mark.parametrize(("t", "truth"), [(499, (-0.08203948, 0.10713317)), (99, (0.33487932, 1.00791886))])
def test_theorem_3_2_numbers(t: int, truth: tuple[float, float]) -> None:
    assert cfg_gradient(WORLDS["vp"], t) == pytest.approx(truth, abs=6e-9)


@pytest.mark.parametrize(("path", "t"), AT)
def test_theorem_3_2_closed_form(path: str, t: float) -> None:
    """The surrogate's gradient is that of -r_cfg = E[log p(x_t|0) - log p(x_t|c)]."""
    a, g = WORLDS[path].at(t).a, WORLDS[path].at(t).g
    (mc, rc), (m0, r0) = CONDITIONAL, UNCONDITIONAL
    uc, u0 = a * a * rc * rc + g * g, a * a * r0 * r0 + g * g
    truth = (a * a * ((MU - mc) / uc - (MU - m0) / u0), a * a * S * (1 / uc - 1 / u0))
    assert cfg_gradient(WORLDS[path], t) == pytest.approx(truth, abs=1e-10)


def test_theorem_3_2_needs_the_stop_gradient() -> None:
    """With live scores the same expression has another gradient, of another sign: (.0340, .2143) at t = 499."""

    world = WORLDS["vp"]

    def live(x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        x_t = world.schedule.add_noise(x0, eps, t)
        s_c = world.schedule.score(world.denoiser(*CONDITIONAL)(x_t, t), x_t, t)
        s_0 = world.schedule.score(world.denoiser(*UNCONDITIONAL)(x_t, t), x_t, t)
        return ((s_0 - s_c) * x_t).sum(1)

    _, wrong = world.expected(live, MU, S, 499)
    right = cfg_gradient(world, 499)
    assert wrong == pytest.approx((0.0340, 0.2143), abs=5e-5)
    assert right[0] < 0 < wrong[0]


@both_paths
def test_implicit_loss_ignores_graphs_of_the_predictions(path: str) -> None:
    schedule = PATHS[path]
    x0, _ = inputs()
    times = torch.tensor([20, 499, 979])
    frozen = implicit_cfg_loss(x0, times, (2 * x0).detach(), (3 * x0).detach(), schedule)
    live = implicit_cfg_loss(x0, times, 2 * x0, 3 * x0, schedule)
    torch.testing.assert_close(two_stage_gradient(live, x0), two_stage_gradient(frozen, x0), rtol=0, atol=0)


@both_paths
@pytest.mark.parametrize("weighting", ["unit_x0", "score", "eps", "inv_mean_abs"])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 7.5])
def test_kl_choice_1_equals_choice_2(alpha: float, weighting: Any, path: str) -> None:
    """Choice 1 with alpha_cfg == Choice 2 with omega = 1 + alpha_cfg, sample by sample, for the KL force."""
    schedule = PATHS[path]
    x0, noise = inputs()
    times = torch.tensor([20, 499, 979])
    psi, cond, uncond = Smooth(1), Smooth(2), Smooth(3)
    x_t = schedule.add_noise(x0, noise, times).detach()

    def guided_reference(x: Tensor, t: Tensor) -> Tensor:
        return guided(cond(x, t), uncond(x, t), guidance_omega(alpha, "one_plus"))

    inner = divergence_loss("kl", x0, times, noise, psi, guided_reference, schedule, weighting)
    outer = outer_divergence_loss(
        registry.divergence("kl"), x0, times, psi(x_t, times), cond(x_t, times), uncond(x_t, times), schedule, alpha,
        weighting,
    )  # fmt: skip
    torch.testing.assert_close(outer, inner, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(two_stage_gradient(outer, x0), two_stage_gradient(inner, x0), rtol=1e-9, atol=1e-9)


@both_paths
@pytest.mark.parametrize("weighting", ["unit_x0", "score", "eps"])
def test_outer_guidance_is_the_sum_of_its_terms(weighting: Any, path: str) -> None:
    schedule = PATHS[path]
    x0, noise = inputs()
    times = torch.tensor([20, 499, 979])
    x_t = schedule.add_noise(x0, noise, times)
    psi, cond, uncond = (Smooth(seed)(x_t, times) for seed in (1, 2, 3))
    divergence = registry.divergence("pseudo_huber")
    outer = outer_divergence_loss(divergence, x0, times, psi, cond, uncond, schedule, 2.0, weighting)
    terms = divergence_loss_from_predictions(divergence, x0, times, psi, cond, schedule, weighting)
    terms = terms + 2.0 * implicit_cfg_loss(x0, times, cond, uncond, schedule, weighting)
    torch.testing.assert_close(outer, terms, rtol=0, atol=0)


def test_the_implicit_force_needs_its_normalizer() -> None:
    x0, _ = inputs()
    with pytest.raises(ValueError, match="normalizer"):
        implicit_cfg_loss(x0, torch.tensor([20, 499, 979]), x0, x0, PATHS["vp"], "inv_mean_abs")


@both_paths
@pytest.mark.parametrize("name", ["l2", "pseudo_huber"])
def test_score_choices_are_different_algorithms(name: str, path: str) -> None:
    schedule = PATHS[path]
    x0, noise = inputs()
    times = torch.tensor([20, 499, 979])
    psi, cond, uncond = Smooth(1), Smooth(2), Smooth(3)
    x_t = schedule.add_noise(x0, noise, times).detach()
    inner = divergence_loss(name, x0, times, noise, psi, lambda x, t: guided(cond(x, t), uncond(x, t), 3.0), schedule)
    outer = divergence_loss(name, x0, times, noise, psi, cond, schedule)
    outer = outer + 2.0 * implicit_cfg_loss(x0, times, cond(x_t, times), uncond(x_t, times), schedule)
    difference = two_stage_gradient(outer, x0) - two_stage_gradient(inner, x0)
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize(("path", "t"), [("vp", 99), ("vp", 499), ("flow", 99), ("flow", 700.5)])
def test_inner_guidance_keeps_theorem_3_1(path: str, t: float) -> None:
    """The guided field is no density's score, yet E[loss] = 0 and both branches are differentiated."""
    world = WORLDS[path]
    a, g, v = world.at(t).a, world.at(t).g, world.at(t).v
    omega = 7.5
    ref_c, ref_u = world.denoiser(*CONDITIONAL), world.denoiser(*UNCONDITIONAL)
    value, gradient = world.regularizer(
        "l2", MU, S, t, reference=lambda x, tt: guided(ref_c(x, tt), ref_u(x, tt), omega), count=8
    )
    # y is linear in x_t: y = A x_t + b, with x_t = a mu + sqrt(v) xi; E over pi_t frozen of d/dtheta ||y||^2.
    uc, u0 = (a * a * r * r + g * g for _, r in (CONDITIONAL, UNCONDITIONAL))
    slope = -1 / v + omega / uc + (1 - omega) / u0
    mean = slope * a * MU + a * MU / v - omega * a * CONDITIONAL[0] / uc - (1 - omega) * a * UNCONDITIONAL[0] / u0
    # d s_p / d mu = a / v;  d s_p / d s = 2 a^2 s (x - a mu) / v^2 = 2 a^2 s xi / v^1.5.
    truth = (2 * mean * a / v, 2 * slope * v**0.5 * 2 * a * a * S / v**1.5)
    assert value == pytest.approx(0, abs=1e-10)
    assert gradient == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize(
    ("scale", "convention", "omega"),
    [(0, "omega", 1), (0, "one_plus", 1), (7.5, "omega", 7.5), (7.5, "one_plus", 8.5), (1, "omega", 1)],
)
def test_guidance_omega(scale: float, convention: Any, omega: float) -> None:
    """alpha_cfg = 0 means no guidance, not the unconditional teacher."""
    assert guidance_omega(scale, convention) == omega


@both_paths
def test_guided_interpolates_and_commutes_with_the_score(path: str) -> None:
    schedule = PATHS[path]
    d_c, d_u = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    x_t, t = torch.randn(2, 4, dtype=torch.float64), torch.tensor([20, 979])
    torch.testing.assert_close(guided(d_c, d_u, 1.0), d_c)
    torch.testing.assert_close(guided(d_c, d_u, 0.0), d_u)
    through_scores = guided(schedule.score(d_c, x_t, t), schedule.score(d_u, x_t, t), 7.5)
    torch.testing.assert_close(schedule.score(guided(d_c, d_u, 7.5), x_t, t), through_scores)


@pytest.mark.parametrize(("path", "t"), [("vp", 499), ("flow", 500)])
def test_kl_gradient_is_unchanged_by_guidance_one(path: str, t: float) -> None:
    world = WORLDS[path]
    ref_c, ref_u = world.denoiser(*CONDITIONAL), world.denoiser(*UNCONDITIONAL)
    _, gradient = world.regularizer(
        "kl", MU, S, t, reference=lambda x, tt: guided(ref_c(x, tt), ref_u(x, tt), guidance_omega(0, "omega"))
    )
    assert gradient == pytest.approx(world.at(t).kl(), abs=1e-10)
