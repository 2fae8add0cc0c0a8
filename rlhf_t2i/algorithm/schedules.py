"""The forward diffusion x_t = a_t x_0 + g_t eps: noise schedule and parametrizations (algorithm.md, section 0)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class NoiseSchedule:
    """A variance-preserving noise schedule with ``a_t = sqrt(abar_t)`` and ``g_t = sqrt(1 - abar_t)``.

    Coefficients are kept in float64: they are tiny, and every conversion between parametrizations divides by one.

    Args:
        alphas_cumprod: ``abar_t`` for t = 0..T-1, strictly decreasing in (0, 1).
        prediction_type: what the networks trained on this schedule predict: ``epsilon``, ``v_prediction`` or
            ``sample``.

    Raises:
        ValueError: The coefficients are not a noise schedule, or the prediction type is unknown.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon") -> None:
        abar = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
        inside, falling = ((abar > 0) & (abar < 1)).all(), (abar.diff() < 0).all()
        if abar.ndim != 1 or len(abar) == 0 or not bool(inside) or not bool(falling):
            raise ValueError("alphas_cumprod must be one-dimensional and strictly decreasing within (0, 1)")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}")
        self.alphas_cumprod = abar
        self.prediction_type = prediction_type

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """Read the schedule of a diffusers scheduler (its betas and prediction type; not its sampling method)."""
        # Recomputed from the betas: schedulers store abar in float32, and some rescale it for their own sampler.
        betas = torch.as_tensor(_betas(scheduler.config), dtype=torch.float64)
        return cls(torch.cumprod(1.0 - betas, dim=0), scheduler.config.get("prediction_type", "epsilon"))

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``(a_t, g_t)`` shaped to broadcast over ``like`` [B, ...], on its device.

        The dtype is ``like``'s, but at least float32: half precision cannot hold ``1 - abar_t`` at low noise.
        """
        abar = self.alphas_cumprod[t.cpu()]
        dtype = torch.promote_types(like.dtype, torch.float32)
        shape = (-1, *([1] * (like.ndim - 1)))
        alpha, sigma = abar.sqrt(), (1.0 - abar).sqrt()
        return alpha.to(like.device, dtype).reshape(shape), sigma.to(like.device, dtype).reshape(shape)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t = a_t x_0 + g_t eps`` for x0, noise [B, ...] and integer t [B]."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * x0 + sigma * noise

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Turn a network's output into the x0-prediction ``D(x_t)``, in float32 or better.

        Raises:
            RuntimeError: A gradient is wanted at x_t, but the network ran without a graph: only this conversion's
                linear part would be differentiated, a bias that no loss shows (algorithm.md 1.4 and 4.4).
        """
        if torch.is_grad_enabled() and x_t.requires_grad and not prediction.requires_grad:
            raise RuntimeError("the network's output has no graph back to x_t: it must not run under no_grad")
        alpha, sigma = self.coefficients(t, x_t)
        prediction = prediction.to(alpha.dtype)
        x_t = x_t.to(alpha.dtype)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / alpha
        if self.prediction_type == "v_prediction":
            return alpha * x_t - sigma * prediction
        return prediction

    def to_epsilon(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Turn a network's output into the noise prediction ``e(x_t)``, in float32 or better."""
        alpha, sigma = self.coefficients(t, x_t)
        prediction = prediction.to(alpha.dtype)
        if self.prediction_type == "epsilon":
            return prediction
        x_t = x_t.to(alpha.dtype)
        if self.prediction_type == "v_prediction":
            return sigma * x_t + alpha * prediction
        return (x_t - alpha * prediction) / sigma

    def score(self, x0_prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``s(x_t) = (a_t D(x_t) - x_t) / g_t^2``."""
        alpha, sigma = self.coefficients(t, x_t)
        return (alpha * x0_prediction - x_t) / sigma**2


def _betas(config: Any) -> Tensor:
    """The betas a diffusers scheduler config describes, in float64."""
    if config.get("rescale_betas_zero_snr"):
        # Another schedule, whose last step has no signal: x_0 cannot be recovered from a noise prediction there.
        raise ValueError("rescale_betas_zero_snr is not supported: every timestep must keep some signal")
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    start, end, steps = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    raise ValueError(f"beta_schedule {kind!r} is not supported: use linear, scaled_linear or trained_betas")
