"""Where training ends up: reward-regularized optima by gradient descent on the project's losses (algorithm.md 4.5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from rlhf_t2i.algorithm.losses import divergence_loss
from rlhf_t2i.plugins import registry
from tests.math.gaussian import MU, WORLDS, M, Moments, R, S, nodes

TIMESTEPS = torch.arange(20, 980)
RATE = {"l2": 0.15, "kl": 0.8}
both_paths = pytest.mark.parametrize("path", WORLDS)


@cache
def grid(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """xi, eps, t and weights [960 * count^2] of the average over timesteps and both normals."""
    xi, eps, weights = nodes(count)
    repeat = len(TIMESTEPS)
    return (
        xi.repeat(repeat, 1),
        eps.repeat(repeat, 1),
        TIMESTEPS.repeat_interleave(len(xi)),
        weights.repeat(repeat) / repeat,
    )


@cache
def moments(path: str) -> Moments:
    """a and g at all timesteps, as arrays."""
    like = torch.zeros(len(TIMESTEPS), dtype=torch.float64)
    a, g = WORLDS[path].schedule.coefficients(TIMESTEPS, like)
    return Moments(a.numpy(), g.numpy())


def average(path: str, value: Callable[[Moments], Any], s: float = R) -> float:
    """E over the timesteps of a function of (a, g, u, v), for a generator of standard deviation s."""
    return float(value(replace(moments(path), s=s)).mean())


def field(
    path: str, divergence: str, reward: Callable[[Tensor], Tensor], theta: Tensor, count: int = 3, **options: float
) -> Tensor:
    """The generator's expected gradient with an exact assistant, averaged over t in 20..979 with w(t) = 1."""
    world, plugin = WORLDS[path], registry.divergence(divergence, **options)
    xi, eps, t, weights = grid(count)
    leaf = theta.clone().requires_grad_(True)
    x0 = leaf[0] + leaf[1] * xi
    assistant, reference = world.denoiser(leaf[0], leaf[1]), world.denoiser(M, R)
    loss = divergence_loss(plugin, x0, t, eps, assistant, reference, world.schedule, "score")
    return torch.autograd.grad((weights * (loss - reward(x0).sum(1))).sum(), leaf)[0]


def descend(
    path: str, divergence: str, reward: Callable[[Tensor], Tensor], rate: float, **options: float
) -> list[float]:
    """Plain gradient descent; three nodes integrate the polynomial losses of L2 and KL exactly."""
    theta = torch.tensor([MU, S], dtype=torch.float64)
    for _ in range(1000):
        step = field(path, divergence, reward, theta, **options)
        theta = theta - rate * step
        if float(step.abs().max()) < 1e-9:
            return theta.tolist()
    raise AssertionError(f"no convergence: {theta.tolist()}, gradient {step.tolist()}")


# Optima on the variance-preserving path as printed in algorithm.md 4.5.
LINEAR = {
    ("l2", 0.1): 0.56871873, ("l2", 0.5): 0.84359365, ("l2", 2.0): 1.87437459,
    ("kl", 0.1): 0.68451515, ("kl", 0.5): 1.42257576, ("kl", 2.0): 4.19030305,
}  # fmt: skip
QUADRATIC = {
    ("l2", 0.2): (0.60290630, 0.77768691), ("l2", 1.0): (0.87136002, 0.71048252),
    ("kl", 0.2): (0.75520411, 0.68366170), ("kl", 1.0): (1.25929005, 0.41671833),
    ("full", 0.2): (0.60640663, 0.77724247), ("full", 1.0): (0.91443640, 0.70418627),
}  # fmt: skip


def linear_optimum(path: str, kind: str, alpha: float) -> float:
    if kind == "l2":
        return M + alpha * 0.9 / (2 * average(path, lambda at: at.a**2 / at.u**2))
    return M + alpha * 0.9 / average(path, lambda at: at.a**2 / at.u)


def quadratic_optimum(path: str, kind: str, alpha: float) -> tuple[float, float]:
    """The stationary point for r = -(kappa / 2) |x - 2|^2 with kappa = 1/2."""
    pull = {
        "l2": lambda at: 4 * at.a**2 * (at.u - at.v) / (at.u * at.v**2),
        "full": lambda at: 2 * at.a**2 * (at.u**2 - at.v**2) / (at.u**2 * at.v**2),
        "kl": lambda at: at.a**2 * (at.u - at.v) / (at.u * at.v),
    }[kind]
    stiffness = {
        "l2": lambda at: 2 * at.a**2 / (at.u * at.v),
        "full": lambda at: 2 * at.a**2 / at.u**2,
        "kl": lambda at: at.a**2 / at.u,
    }[kind]
    s = brentq(lambda s: average(path, pull, s) - alpha * 0.5, 0.1, R, xtol=1e-11)
    g = average(path, stiffness, s)
    return (alpha * 0.5 * 2.0 + g * M) / (alpha * 0.5 + g), s


def test_the_formulas_give_the_printed_optima() -> None:
    for (kind, alpha), value in LINEAR.items():
        assert linear_optimum("vp", kind, alpha) == pytest.approx(value, abs=6e-9)
    for (kind, alpha), pair in QUADRATIC.items():
        assert quadratic_optimum("vp", kind, alpha) == pytest.approx(pair, abs=6e-9)


@both_paths
@pytest.mark.parametrize("divergence", ["l2", "kl"])
def test_linear_reward(divergence: str, path: str) -> None:
    """The mean moves by a known amount; the spread stays the reference's."""
    found = descend(path, divergence, lambda x: 0.5 * 0.9 * x, RATE[divergence])
    assert found == pytest.approx([linear_optimum(path, divergence, 0.5), R], abs=1e-8)


@both_paths
@pytest.mark.parametrize("kind", ["l2", "kl", "full"])
def test_quadratic_reward(kind: str, path: str) -> None:
    """DI* lands on the fixed point of the frozen field; SiD's alpha 1/2 on the minimizer of the total divergence."""
    name, options = ("l2", {"alpha": 0.5}) if kind == "full" else (kind, {})
    found = descend(path, name, lambda x: -0.25 * (x - 2.0) ** 2, RATE[name] / 2, **options)
    assert found == pytest.approx(quadratic_optimum(path, kind, 1.0), abs=1e-8)
    if kind != "kl":
        other = quadratic_optimum(path, "full" if kind == "l2" else "l2", 1.0)
        assert max(abs(a - b) for a, b in zip(found, other, strict=True)) > 4e-4


class ScoreHuber(registry.load_class(registry.DIVERGENCES, "pseudo_huber")):  # type: ignore[misc]
    """The shipped pseudo-Huber with one constant in score space for all timesteps: c_x = (g_t^2 / a_t) c."""

    def __init__(self, path: str, c: float, t: Tensor) -> None:
        super().__init__()
        alpha, sigma = WORLDS[path].schedule.coefficients(t, torch.zeros(len(t), 1, dtype=torch.float64))
        self._c = (sigma**2 / alpha * c).reshape(-1)

    def _radius(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        return (delta.square().flatten(1).sum(1) + self._c**2).sqrt(), self._c


def huber_force(path: str, shift: float, c: float = 0.1) -> tuple[float, float]:
    """The regularizer's pull at N(m + shift, r^2): there y is constant in x_t and three nodes are exact."""
    world = WORLDS[path]
    xi, eps, t, weights = grid(3)
    leaf = torch.tensor([M + shift, R], dtype=torch.float64, requires_grad=True)
    x0 = leaf[0] + leaf[1] * xi
    psi, ref = world.denoiser(leaf[0], leaf[1]), world.denoiser(M, R)
    loss = divergence_loss(ScoreHuber(path, c, t), x0, t, eps, psi, ref, world.schedule, "score")
    gradient = torch.autograd.grad((weights * loss).sum(), leaf)[0]
    return gradient[0].item(), gradient[1].item()


def largest_force(path: str) -> float:
    return average(path, lambda at: at.a / at.u)


def test_pseudo_huber_optimum_and_its_largest_force_as_printed() -> None:
    force, spread = huber_force("vp", 0.02905401)
    assert force == pytest.approx(0.2 * 0.9, abs=1e-7)
    assert spread == pytest.approx(0, abs=1e-12)
    assert largest_force("vp") == pytest.approx(0.67085431, abs=1e-8)


@both_paths
def test_pseudo_huber_pulls_by_the_closed_form_and_never_more_than_its_largest_force(path: str) -> None:
    for shift in (0.03, 3.0):
        y = moments(path).a * shift / moments(path).u
        truth = float((moments(path).a / moments(path).u * y / (y**2 + 0.01) ** 0.5).mean())
        assert huber_force(path, shift)[0] == pytest.approx(truth, rel=1e-10)
    assert huber_force(path, 1e7)[0] == pytest.approx(largest_force(path), abs=1e-8)
    assert huber_force(path, 3.0)[0] < largest_force(path)


@both_paths
def test_pseudo_huber_converges_below_the_cliff(path: str) -> None:
    shift = 0.8
    for _ in range(2000):
        step = huber_force(path, shift)[0] - 0.6 * largest_force(path)
        shift -= 0.1 * step
        if abs(step) < 1e-7:
            break
    assert abs(step) < 1e-7
    assert 0 < shift < 10


@both_paths
def test_pseudo_huber_diverges_above_the_cliff(path: str) -> None:
    """alpha_r k >= F_max: there is no finite optimum, the mean climbs for ever; L2 and KL always stop."""
    reward = 1.1 * largest_force(path)
    for shift in (0.8, 10.0, 1e3, 1e6):
        assert huber_force(path, shift)[0] < reward
    shift, positions = 0.8, []
    for _ in range(60):
        shift -= 50.0 * (huber_force(path, shift)[0] - reward)
        positions.append(shift)
    assert all(later > earlier for earlier, later in pairwise(positions))
    late, early = positions[-1] - positions[-11], positions[29] - positions[19]
    # The speed tends to a constant, alpha k - F_max > 0, instead of zero.
    assert late == pytest.approx(10 * 50 * 0.1 * largest_force(path), rel=0.05)
    assert late == pytest.approx(early, rel=0.1)
