"""Noise schedules ``x_t = a_t x_0 + g_t eps``: variance preserving and flow matching behind one protocol.

Everything above this module is written in x0-predictions ``D(x_t)``; only the conversions here depend on the path
(algorithm.md section 0, docs/algorithm.md). Timesteps are tensors [B] in thousandths, 0 to 1000, for both paths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_t2i.algorithm import rng
from rlhf_t2i.algorithm.timesteps import TimestepLaw, quantile
from rlhf_t2i.utils.device import send

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TimeArgument = Literal["thousandths", "sigma", "one_minus_sigma"]


class Schedule(ABC):
    """A path from data to noise, and what a network on it predicts.

    Attributes:
        first: The smallest timestep at which ``D`` can be recovered, in thousandths.
        last: The largest one.
    """

    first: float
    last: float

    @abstractmethod
    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``(a_t, g_t)`` shaped to broadcast over ``like`` [B, ...], on its device, in float32 or better."""

    @abstractmethod
    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert a network's output into the x0-prediction ``D(x_t)``, in float32 or better.

        Raises:
            RuntimeError: A gradient is wanted at x_t, but the network ran without a graph: only this conversion's
                linear part would be differentiated, a bias that no loss shows (algorithm.md 1.4 and 4.4).
        """

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The regression target of the network at ``x_t``, in its own parametrization."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """The time argument that the network is called with, [B]."""

    @abstractmethod
    def training_range(self, role: Literal["generator", "assistant"]) -> tuple[float, float]:
        """The default ``(first, last)`` from which a role's training timesteps are drawn, in thousandths."""

    @abstractmethod
    def default_law(self) -> TimestepLaw:
        """The distribution of training timesteps that the reference was trained with."""

    @abstractmethod
    def sample_timesteps(self, law: TimestepLaw | None, first: float, last: float, keys: Sequence[rng.Key]) -> Tensor:
        """One timestep [B] per key between ``first`` and ``last``, inclusive; ``None`` uses :meth:`default_law`."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t = a_t x_0 + g_t eps`` for x0 and noise [B, ...]."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * x0 + sigma * noise

    def score(self, x0_prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``s(x_t) = (a_t D(x_t) - x_t) / g_t^2``."""
        alpha, sigma = self.coefficients(t, x_t)
        return (alpha * x0_prediction - x_t) / sigma**2

    def noise(self, x0_prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise ``(x_t - a_t D(x_t)) / g_t`` that an x0-prediction implies."""
        alpha, sigma = self.coefficients(t, x_t)
        return (x_t - alpha * x0_prediction) / sigma


class VPSchedule(Schedule):
    """Variance preserving: ``a_t = sqrt(abar_t)``, ``g_t = sqrt(1 - abar_t)``, for T discrete training timesteps.

    Coefficients are kept in float64: ``1 - abar_t`` is tiny at low noise, and every conversion divides by one.

    Args:
        alphas_cumprod: ``abar_t`` for t = 0..T-1, strictly decreasing in (0, 1); the last one may be 0 (zero terminal
            SNR): that timestep is then outside ``first .. last``.
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``: what the networks predict.

    Raises:
        ValueError: The coefficients are not a noise schedule, or the prediction type is unknown.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon") -> None:
        abar = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
        # Strictly falling from below 1 to 0 or more: only the last one can be 0.
        falling = abar.ndim == 1 and len(abar) > 0 and bool((abar.diff() < 0).all())
        if not falling or not 0 < float(abar[0]) < 1 or not float(abar[-1]) >= 0:
            raise ValueError("alphas_cumprod must be one-dimensional and strictly decreasing within (0, 1)")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}")
        self.alphas_cumprod = abar
        self.prediction_type = prediction_type
        usable = len(abar) - 1 if float(abar[-1]) == 0 else len(abar)
        # The first thousandth past the last usable index is excluded; for T = 1000 that is 999.
        self.first, self.last = 0.0, float(-(-1000 * usable // len(abar)) - 1)
        self._on_device = {abar.device: (abar.sqrt(), (1.0 - abar).sqrt())}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VPSchedule:
        """Read the schedule of a diffusers scheduler configuration (its betas and prediction type).

        Raises:
            KeyError: A number that the beta schedule needs is missing.
            ValueError: The beta schedule is unknown.
        """
        # Recomputed from the betas: schedulers store abar in float32, and some rescale it for their own sampler.
        abar = torch.cumprod(1.0 - _betas(config), dim=0)
        if config.get("rescale_betas_zero_snr"):
            abar = _zero_terminal_snr(abar)
        return cls(abar, config.get("prediction_type", "epsilon"))

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def index(self, t: Tensor) -> Tensor:
        """The training timestep 0..T-1 of thousandths ``t`` [B], as int64 on ``t``'s device."""
        if len(self) == 1000:
            return t.long()
        return (t.double() * len(self) / 1000).long()

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Schedule.coefficients`."""
        if like.device not in self._on_device:
            tables = self._on_device[self.alphas_cumprod.device]
            self._on_device[like.device] = (send(tables[0], like.device), send(tables[1], like.device))
        alpha, sigma = self._on_device[like.device]
        index = self.index(send(t, like.device))
        return _broadcast(alpha[index], like), _broadcast(sigma[index], like)

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """See :meth:`Schedule.to_x0`."""
        _check_graph(prediction, x_t)
        alpha, sigma = self.coefficients(t, x_t)
        prediction, x_t = prediction.to(alpha.dtype), x_t.to(alpha.dtype)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / alpha
        if self.prediction_type == "v_prediction":
            return alpha * x_t - sigma * prediction
        return prediction

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``eps``, ``a eps - g x_0`` (v) or ``x_0``."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            alpha, sigma = self.coefficients(t, x0)
            return alpha * noise - sigma * x0
        return x0

    def network_time(self, t: Tensor) -> Tensor:
        """The training timestep, int64."""
        return self.index(t)

    def training_range(self, role: Literal["generator", "assistant"]) -> tuple[float, float]:
        """20 to 979 for the divergence, everything for the assistant's loss (algorithm.md 2.3)."""
        return (20.0, min(979.0, self.last)) if role == "generator" else (self.first, self.last)

    def default_law(self) -> TimestepLaw:
        """Uniform: the published algorithm."""
        return TimestepLaw("uniform")

    def sample_timesteps(self, law: TimestepLaw | None, first: float, last: float, keys: Sequence[rng.Key]) -> Tensor:
        """Integers in thousandths; see :meth:`Schedule.sample_timesteps`."""
        law = law or self.default_law()
        if law.kind == "uniform":
            return rng.timesteps(int(first), int(last), keys)
        values = quantile(law, first / 1000, last / 1000, rng.uniform(keys))
        return (1000 * values).round().long().clamp(int(first), int(last))


class FlowSchedule(Schedule):
    """Flow matching (rectified flow): ``a = 1 - s``, ``g = s`` with s = t / 1000; networks predict ``eps - x_0``.

    Args:
        shift: The family's timestep shift k; ``s = k u / (1 + (k - 1) u)`` (SD3, arXiv 2403.03206).
        time: What the network is given: ``1000 s``, ``s`` or ``1 - s``.
        sign: -1 for networks that predict ``x_0 - eps`` (Z-Image).
    """

    def __init__(self, shift: float = 1.0, time: TimeArgument = "thousandths", sign: Literal[1, -1] = 1) -> None:
        if not shift > 0:
            raise ValueError(f"shift must be positive, not {shift}")
        self.shift, self.time, self.sign = float(shift), time, sign
        # The score divides by s, and at s = 0 there is no noise to remove.
        self.first, self.last = 1.0, 1000.0

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Schedule.coefficients`."""
        s = send(t, like.device).double() / 1000
        return _broadcast(1.0 - s, like), _broadcast(s, like)

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``D = x_t - s v``; well conditioned at every s, pure noise included."""
        _check_graph(prediction, x_t)
        _, s = self.coefficients(t, x_t)
        return x_t.to(s.dtype) - s * (self.sign * prediction.to(s.dtype))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``eps - x_0``, with the network's sign."""
        return self.sign * (noise - x0)

    def network_time(self, t: Tensor) -> Tensor:
        """Float32 [B] as :attr:`time` says."""
        s = t.double() / 1000
        value = {"thousandths": t.double(), "sigma": s, "one_minus_sigma": 1 - s}[self.time]
        return value.float()

    def training_range(self, role: Literal["generator", "assistant"]) -> tuple[float, float]:
        """20 to 980 for both."""
        return 20.0, 980.0

    def default_law(self) -> TimestepLaw:
        """Uniform, shifted as the reference was trained."""
        return TimestepLaw("shifted", shift=self.shift)

    def sample_timesteps(self, law: TimestepLaw | None, first: float, last: float, keys: Sequence[rng.Key]) -> Tensor:
        """Float64 thousandths; see :meth:`Schedule.sample_timesteps`."""
        return 1000 * quantile(law or self.default_law(), first / 1000, last / 1000, rng.uniform(keys))


def _check_graph(prediction: Tensor, x_t: Tensor) -> None:
    if torch.is_grad_enabled() and x_t.requires_grad and not prediction.requires_grad:
        raise RuntimeError("the network's output has no graph back to x_t: it must not run under no_grad")


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    """Values [B] over ``like`` [B, ...]: half precision cannot hold ``1 - abar_t`` at low noise."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return values.to(dtype).reshape(-1, *([1] * (like.ndim - 1)))


def _betas(config: Mapping[str, Any]) -> Tensor:
    """The betas a diffusers scheduler configuration describes, in float64."""
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    start, end, steps = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    raise ValueError(f"beta_schedule {kind!r} is not supported: use linear, scaled_linear or trained_betas")


def _zero_terminal_snr(abar: Tensor) -> Tensor:
    """Shift and scale ``sqrt(abar)`` so that the last one is 0 and the first is kept (arXiv:2305.08891, Alg. 1)."""
    root = abar.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    root[-1] = 0.0
    return root.square()
