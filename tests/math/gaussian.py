"""The Gaussian world of algorithm.md section 4: p_theta = N(mu, s^2), p_ref = N(m, r^2), every expectation exact.

The formulas hold for any path ``x_t = a x_0 + g eps``; :data:`WORLDS` holds SDXL's variance-preserving one and flow
matching.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_t2i.algorithm.losses import Denoiser, divergence_loss
from rlhf_t2i.algorithm.schedules import FlowSchedule, Schedule, VPSchedule

MU, S, M, R = 1.3, 1.2, 0.5, 0.8
VP_TIMES = (20, 99, 249, 399, 499, 749, 979)
SCHEDULE = VPSchedule(
    torch.cumprod(1.0 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)
)


@cache
def golden() -> dict[str, Any]:
    """Closed forms of the variance-preserving path in full precision, by timestep."""
    return json.loads((Path(__file__).parent / "data" / "gaussian_golden.json").read_text("utf-8"))["t"]


@dataclass(frozen=True)
class Moments:
    """The closed forms at one timestep for the Gaussians of this module (algorithm.md 4.2).

    Attributes:
        a: Of the path.
        g: Of the path.
        mu: Mean of the generator.
        s: Its standard deviation.
        m: Mean of the reference.
        r: Its standard deviation.
    """

    a: Any  # a float, or an array over timesteps
    g: Any
    mu: float = MU
    s: float = S
    m: float = M
    r: float = R

    @property
    def v(self) -> Any:
        """Variance of x_t under the generator."""
        return self.a**2 * self.s**2 + self.g**2

    @property
    def u(self) -> Any:
        """Variance of x_t under the reference."""
        return self.a**2 * self.r**2 + self.g**2

    def l2(self) -> float:
        """E||y||^2."""
        return (self.a * (self.mu - self.m) / self.u) ** 2 + (self.v - self.u) ** 2 / (self.u**2 * self.v)

    def l2_frozen(self) -> tuple[float, float]:
        """Its gradient in (mu, s) for a frozen sampling law: DI*, SIM."""
        a, v, u = self.a, self.v, self.u
        return 2 * a * a * (self.mu - self.m) / (u * v), 4 * a * a * self.s * (v - u) / (u * v * v)

    def l2_full(self) -> tuple[float, float]:
        """Its whole gradient: SiD with alpha 1/2."""
        a, v, u = self.a, self.v, self.u
        return 2 * a * a * (self.mu - self.m) / u**2, 2 * a * a * self.s * (v * v - u * u) / (u * u * v * v)

    def kl(self) -> tuple[float, float]:
        """Gradient of the Kullback-Leibler divergence."""
        a, v, u = self.a, self.v, self.u
        return a * a * (self.mu - self.m) / u, a * a * self.s * (v - u) / (u * v)

    def huber(self, c: float) -> float:
        """E[d(y)] of pseudo-Huber with the constant c in score space."""
        return self._mean(lambda y, xi, rho: rho - c, c)

    def huber_frozen(self, c: float) -> tuple[float, float]:
        """Its gradient for a frozen sampling law."""
        a, v = self.a, self.v
        first, second = self._mean(lambda y, xi, rho: y / rho, c), self._mean(lambda y, xi, rho: y * xi / rho, c)
        return a / v * first, 2 * a * a * self.s * v**-1.5 * second

    def _mean(self, f: Callable[[Any, Any, Any], Any], c: float) -> float:
        """E over xi ~ N(0, 1) by the trapezoidal rule, which converges exponentially."""
        xi = np.arange(-12, 12.0001, 0.0005)
        weights = np.exp(-0.5 * xi**2)
        y = (1 / self.u - 1 / self.v) * self.v**0.5 * xi + self.a * (self.mu - self.m) / self.u
        return float(weights @ f(y, xi, np.sqrt(y**2 + c**2)) / weights.sum())


@dataclass(frozen=True)
class World:
    """The two Gaussians on one path.

    Attributes:
        schedule: The path.
        times: Timesteps to test, in thousandths.
    """

    schedule: Schedule
    times: tuple[float, ...]

    def at(self, t: float, **changes: float) -> Moments:
        """The closed forms at a timestep."""
        a, g = self.schedule.coefficients(self.tensor(t, 1), torch.zeros(1, dtype=torch.float64))
        return Moments(a.item(), g.item(), **changes)

    def tensor(self, t: float, count: int) -> Tensor:
        """A timestep for ``count`` samples."""
        return torch.full((count,), t, dtype=torch.int64 if isinstance(t, int) else torch.float64)

    def denoiser(self, mean: float | Tensor, std: float | Tensor) -> Denoiser:
        """The exact x0-prediction of N(mean, std^2), frozen; gradients flow through x_t only."""
        mean, std = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (mean, std))

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = self.schedule.coefficients(t, x_t)
            return (alpha * std**2 * x_t + sigma**2 * mean) / (alpha**2 * std**2 + sigma**2)

        return predict

    def expected(
        self,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor],
        mu: float,
        s: float,
        t: float,
        count: int | None = None,
    ) -> tuple[float, tuple[float, float]]:
        """``E[loss(x0, t, eps)]`` and its gradient in (mu, s), for x0 = mu + s xi.

        Args:
            loss: Per-sample loss of x0 [N, 1], t [N] and eps [N, 1].
            mu: Mean of the generator.
            s: Standard deviation of the generator.
            t: Timestep.
            count: Gauss-Hermite nodes per dimension, for polynomials; None integrates along x_t finely.
        """
        theta = torch.tensor([mu, s], dtype=torch.float64, requires_grad=True)
        at = self.at(t)
        xi, eps, weights = rotated_nodes(at.a, at.g, s) if count is None else nodes(count)
        value = (weights * loss(theta[0] + theta[1] * xi, self.tensor(t, len(xi)), eps)).sum()
        (gradient,) = torch.autograd.grad(value, theta)
        return value.item(), (gradient[0].item(), gradient[1].item())

    def regularizer(
        self,
        divergence: Any,
        mu: float,
        s: float,
        t: float,
        reference: Denoiser | None = None,
        assistant: Denoiser | None = None,
        count: int | None = None,
        weighting: Any = "score",
    ) -> tuple[float, tuple[float, float]]:
        """Value and gradient of the project's regularizer with an exact assistant."""
        psi, ref = assistant or self.denoiser(mu, s), reference or self.denoiser(M, R)
        return self.expected(
            lambda x0, times, eps: divergence_loss(divergence, x0, times, eps, psi, ref, self.schedule, weighting),
            mu,
            s,
            t,
            count,
        )


# At t = 1000 flow matching has no signal left (a = 0); every divergence is zero there. Its times are continuous.
WORLDS = {"vp": World(SCHEDULE, VP_TIMES), "flow": World(FlowSchedule(shift=3.0), (20, 99, 249.5, 500, 749, 980, 1000))}
AT = [(name, t) for name, world in WORLDS.items() for t in world.times]
"""Every path and timestep, for ``pytest.mark.parametrize(("path", "t"), AT)``."""


@cache
def nodes(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gauss-Hermite nodes of two standard normals: xi [N, 1], eps [N, 1] and weights [N]."""
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    weights = weights / weights.sum()
    first, second = np.meshgrid(points, points, indexing="ij")
    columns = [torch.from_numpy(np.ascontiguousarray(grid.reshape(-1, 1))) for grid in (first, second)]
    return columns[0], columns[1], torch.from_numpy(np.outer(weights, weights).reshape(-1))


@cache
def rotated_nodes(a: float, g: float, s: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same two normals, turned so that the first new axis is x_t: fine there, four nodes across.

    ``x_t = a mu + sqrt(v) first`` with v = a^2 s^2 + g^2. A pseudo-Huber loss has poles near the real axis in x_t,
    which Gauss-Hermite cannot resolve, and is quadratic in the other direction. The trapezoidal rule converges
    exponentially: its error is about exp(-2 pi width / step).
    """
    root_v = (a * a * s * s + g * g) ** 0.5
    fine = torch.arange(-9, 9.0005, 0.002, dtype=torch.float64)
    fine_weights = torch.exp(-0.5 * fine**2)
    points, weights = np.polynomial.hermite_e.hermegauss(4)
    first, second = torch.meshgrid(fine, torch.from_numpy(points), indexing="ij")
    total = torch.outer(fine_weights / fine_weights.sum(), torch.from_numpy(weights / weights.sum()))
    xi = (a * s * first + g * second) / root_v
    eps = (g * first - a * s * second) / root_v
    return xi.reshape(-1, 1), eps.reshape(-1, 1), total.reshape(-1)
