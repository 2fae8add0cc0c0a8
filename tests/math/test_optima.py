"""Where training ends up: reward-regularized optima by gradient descent on the project's losses (algorithm.md 4.5)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rlhf_t2i.algorithm.losses import divergence_loss
from rlhf_t2i.plugins import registry
from tests.math.gaussian import MU, SCHEDULE, M, R, S, denoiser, nodes

TIMESTEPS = torch.arange(20, 980)
RATE = {"l2": 0.3, "kl": 0.8}


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


def field(divergence: str, reward: Callable[[Tensor], Tensor], theta: Tensor, count: int = 3) -> Tensor:
    """The generator's expected gradient with an exact assistant, averaged over t in 20..979 with w(t) = 1."""
    xi, eps, t, weights = grid(count)
    leaf = theta.clone().requires_grad_(True)
    x0 = leaf[0] + leaf[1] * xi
    assistant, reference = denoiser(leaf[0], leaf[1]), denoiser(M, R)
    loss = divergence_loss(divergence, x0, t, eps, assistant, reference, SCHEDULE, "score")
    return torch.autograd.grad((weights * (loss - reward(x0).sum(1))).sum(), leaf)[0]


def descend(divergence: str, reward: Callable[[Tensor], Tensor], rate: float) -> list[float]:
    """Plain gradient descent; three nodes integrate the polynomial losses of L2 and KL exactly."""
    theta = torch.tensor([MU, S], dtype=torch.float64)
    for _ in range(1000):
        step = field(divergence, reward, theta)
        theta = theta - rate * step
        if float(step.abs().max()) < 1e-11:
            return theta.tolist()
    raise AssertionError(f"no convergence: {theta.tolist()}, gradient {step.tolist()}")


@pytest.mark.parametrize(
    ("divergence", "alpha", "mean"),
    [
        ("l2", 0.1, 0.56871873),
        ("l2", 0.5, 0.84359365),
        ("l2", 2.0, 1.87437459),
        ("kl", 0.1, 0.68451515),
        ("kl", 0.5, 1.42257576),
        ("kl", 2.0, 4.19030305),
    ],
)
def test_linear_reward(divergence: str, alpha: float, mean: float) -> None:
    """The mean moves by a known amount; the spread stays the reference's."""
    assert descend(divergence, lambda x: alpha * 0.9 * x, RATE[divergence]) == pytest.approx([mean, R], abs=1e-8)


@pytest.mark.parametrize(
    ("divergence", "alpha", "optimum", "full"),
    [
        ("l2", 0.2, (0.60290630, 0.77768691), (0.60640663, 0.77724247)),
        ("l2", 1.0, (0.87136002, 0.71048252), (0.91443640, 0.70418627)),
        ("kl", 0.2, (0.75520411, 0.68366170), None),
        ("kl", 1.0, (1.25929005, 0.41671833), None),
    ],
)
def test_quadratic_reward(
    divergence: str, alpha: float, optimum: tuple[float, float], full: tuple[float, float] | None
) -> None:
    """DI* lands on the fixed point of the frozen field, which is not the minimizer of the total divergence."""
    found = descend(divergence, lambda x: -alpha * 0.25 * (x - 2.0) ** 2, RATE[divergence] / 2)
    assert found == pytest.approx(optimum, abs=1e-8)
    if full is not None:
        assert max(abs(a - b) for a, b in zip(found, full, strict=True)) > 4e-4


class ScoreHuber(registry.load_class(registry.DIVERGENCES, "pseudo_huber")):  # type: ignore[misc]
    """The shipped pseudo-Huber with one constant in score space for all timesteps: c_x = (g_t^2 / a_t) c."""

    def __init__(self, c: float, t: Tensor) -> None:
        super().__init__()
        alpha, sigma = SCHEDULE.coefficients(t, torch.zeros(len(t), 1, dtype=torch.float64))
        self._c = (sigma**2 / alpha * c).reshape(-1)

    def _radius(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        return (delta.square().flatten(1).sum(1) + self._c**2).sqrt(), self._c


def huber_force(shift: float, c: float = 0.1) -> tuple[float, float]:
    """The regularizer's pull at N(m + shift, r^2): there y is constant in x_t and three nodes are exact."""
    xi, eps, t, weights = grid(3)
    leaf = torch.tensor([M + shift, R], dtype=torch.float64, requires_grad=True)
    x0 = leaf[0] + leaf[1] * xi
    loss = divergence_loss(ScoreHuber(c, t), x0, t, eps, denoiser(leaf[0], leaf[1]), denoiser(M, R), SCHEDULE, "score")
    gradient = torch.autograd.grad((weights * loss).sum(), leaf)[0]
    return gradient[0].item(), gradient[1].item()


def test_pseudo_huber_optimum_and_its_largest_force() -> None:
    force, spread = huber_force(0.02905401)
    assert force == pytest.approx(0.2 * 0.9, abs=1e-7)
    assert spread == pytest.approx(0, abs=1e-12)
    assert huber_force(1e7)[0] == pytest.approx(0.67085431, abs=1e-8)
    assert huber_force(3.0)[0] < 0.67085431


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_pseudo_huber_converges_below_the_cliff(alpha: float) -> None:
    shift = 0.8
    for _ in range(2000):
        step = huber_force(shift)[0] - alpha * 0.9
        shift -= 0.1 * step
        if abs(step) < 1e-9:
            break
    assert abs(step) < 1e-9
    assert 0 < shift < 10


@pytest.mark.parametrize("alpha", [0.75, 1.0])
def test_pseudo_huber_diverges_above_the_cliff(alpha: float) -> None:
    """alpha_r k >= F_max = 0.67085: there is no finite optimum, the mean climbs for ever; L2 and KL always stop."""
    for shift in (0.8, 10.0, 1e3, 1e6):
        assert huber_force(shift)[0] < alpha * 0.9
    shift, path = 0.8, []
    for _ in range(60):
        shift -= 50.0 * (huber_force(shift)[0] - alpha * 0.9)
        path.append(shift)
    assert all(later > earlier for earlier, later in pairwise(path))
    late, early = path[-1] - path[-11], path[29] - path[19]
    # The speed tends to a constant, alpha k - F_max > 0, instead of zero.
    assert late == pytest.approx(10 * 50 * (alpha * 0.9 - 0.67085431), rel=0.05)
    assert late == pytest.approx(early, rel=0.1)
