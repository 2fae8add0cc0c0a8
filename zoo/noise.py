"""SDXL's noise schedule and a fast solver for small models, in plain torch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from zoo import device

STEPS = 1000
Predict = Callable[[Tensor, Tensor], Tensor]


def coefficients() -> tuple[Tensor, Tensor]:
    """Alpha and sigma [1000] of x_t = alpha x0 + sigma noise, on the device."""
    return _coefficients(device.DEVICE)


@functools.cache
def _coefficients(where: torch.device) -> tuple[Tensor, Tensor]:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64).square()
    kept = (1 - betas).cumprod(0)
    return kept.sqrt().float().to(where), (1 - kept).sqrt().float().to(where)


def min_snr(t: Tensor, gamma: float = 5.0, floor: float = 0.1) -> Tensor:
    """Weights [B] of the error of the noise: min(SNR, gamma) + floor in terms of x0 (arXiv 2303.09556).

    The floor is for the highest noise, where the picture's subject is decided and the noise itself is no task.
    """
    alpha, sigma = (c[t] for c in coefficients())
    snr = (alpha / sigma).square()
    return (snr.clamp(max=gamma) + floor) / snr


def timesteps(size: int, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1000), one in each of ``size`` equal parts, shuffled."""
    place = (torch.arange(size, device=device.DEVICE) + device.rand(size, generator=generator)) / size
    return (place * STEPS).long().clamp(max=STEPS - 1)[device.randperm(size, generator=generator)]


@torch.no_grad()
def solve(predict: Predict, noise: Tensor, steps: int) -> Tensor:
    """DPM-Solver++(2M) from noise to x0; ``predict`` gives the noise in x_t at times t [B]."""
    alpha, sigma = coefficients()
    times = torch.linspace(STEPS - 1, 0, steps + 1).round().long().tolist()
    x, last = noise, None
    for i in range(steps):
        now, after = times[i], times[i + 1]
        x0 = (x - sigma[now] * predict(x, torch.full((len(x),), now, device=x.device))) / alpha[now]
        if i == steps - 1:
            return x0
        half_log = lambda t: (alpha[t] / sigma[t]).log()  # noqa: E731
        h = half_log(after) - half_log(now)
        direction = x0
        if last is not None:
            r = (half_log(now) - half_log(times[i - 1])) / h
            direction = x0 + (x0 - last) / (2 * r)
        x = sigma[after] / sigma[now] * x - alpha[after] * torch.expm1(-h) * direction
        last = x0
    return x
