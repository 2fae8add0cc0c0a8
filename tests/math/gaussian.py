"""The Gaussian world of algorithm.md section 4: p_theta = N(mu, s^2), p_ref = N(m, r^2), every expectation exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_t2i.algorithm.losses import Denoiser, divergence_loss
from rlhf_t2i.algorithm.schedules import VPSchedule

MU, S, M, R = 1.3, 1.2, 0.5, 0.8
TIMES = (20, 99, 249, 399, 499, 749, 979)
SCHEDULE = VPSchedule(
    torch.cumprod(1.0 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)
)


@cache
def golden() -> dict[str, Any]:
    """Closed forms in full precision, by timestep."""
    return json.loads((Path(__file__).parent / "data" / "gaussian_golden.json").read_text("utf-8"))["t"]


def coefficients(t: int) -> tuple[float, float]:
    """``(a_t, g_t)``."""
    abar = float(SCHEDULE.alphas_cumprod[t])
    return abar**0.5, (1 - abar) ** 0.5


def denoiser(mean: float | Tensor, std: float | Tensor) -> Denoiser:
    """The exact x0-prediction of N(mean, std^2), frozen; gradients flow through x_t only."""
    mean, std = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (mean, std))

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = SCHEDULE.coefficients(t, x_t)
        score = -(x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return (x_t + sigma**2 * score) / alpha

    return predict


@cache
def nodes(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gauss-Hermite nodes of two standard normals: xi [N, 1], eps [N, 1] and weights [N]."""
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    weights = weights / weights.sum()
    first, second = np.meshgrid(points, points, indexing="ij")
    columns = [torch.from_numpy(np.ascontiguousarray(grid.reshape(-1, 1))) for grid in (first, second)]
    return columns[0], columns[1], torch.from_numpy(np.outer(weights, weights).reshape(-1))


@cache
def rotated_nodes(t: int, s: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same two normals, turned so that the first new axis is x_t: fine there, four nodes across.

    ``x_t = a mu + sqrt(v) first`` with v = a^2 s^2 + g^2. A pseudo-Huber loss has poles near the real axis in x_t,
    which Gauss-Hermite cannot resolve, and is quadratic in the other direction. The trapezoidal rule converges
    exponentially: its error is about exp(-2 pi width / step).
    """
    a, g = coefficients(t)
    root_v = (a * a * s * s + g * g) ** 0.5
    fine = torch.arange(-9, 9.0005, 0.002, dtype=torch.float64)
    fine_weights = torch.exp(-0.5 * fine**2)
    points, weights = np.polynomial.hermite_e.hermegauss(4)
    first, second = torch.meshgrid(fine, torch.from_numpy(points), indexing="ij")
    total = torch.outer(fine_weights / fine_weights.sum(), torch.from_numpy(weights / weights.sum()))
    xi = (a * s * first + g * second) / root_v
    eps = (g * first - a * s * second) / root_v
    return xi.reshape(-1, 1), eps.reshape(-1, 1), total.reshape(-1)


def expected(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], mu: float, s: float, t: int, count: int | None = None
) -> tuple[float, tuple[float, float]]:
    """``E[loss(x0, t, eps)]`` and its gradient in (mu, s), for x0 = mu + s xi.

    Args:
        loss: Per-sample loss of x0 [N, 1], t [N] and eps [N, 1].
        mu: Mean of the generator.
        s: Standard deviation of the generator.
        t: Timestep.
        count: Gauss-Hermite nodes a dimension, for polynomials; None integrates along x_t finely.
    """
    theta = torch.tensor([mu, s], dtype=torch.float64, requires_grad=True)
    xi, eps, weights = rotated_nodes(t, s) if count is None else nodes(count)
    value = (weights * loss(theta[0] + theta[1] * xi, torch.full((len(xi),), t), eps)).sum()
    (gradient,) = torch.autograd.grad(value, theta)
    return value.item(), (gradient[0].item(), gradient[1].item())


def regularizer(
    divergence: Any,
    mu: float,
    s: float,
    t: int,
    reference: Denoiser | None = None,
    assistant: Denoiser | None = None,
    count: int | None = None,
    weighting: Any = "score",
) -> tuple[float, tuple[float, float]]:
    """Value and gradient of the project's regularizer with an exact assistant."""
    psi, ref = assistant or denoiser(mu, s), reference or denoiser(M, R)
    return expected(
        lambda x0, times, eps: divergence_loss(divergence, x0, times, eps, psi, ref, SCHEDULE, weighting),
        mu,
        s,
        t,
        count,
    )
