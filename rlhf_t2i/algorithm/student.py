"""The few-step generator: K denoising steps from noise to x_0 (DMD2, arXiv 2405.14867). One step is K = 1.

``x_{tau_1} = z``; for k = 1..K: ``x_0^k = D(x_{tau_k}, tau_k)``, then ``x_{tau_{k+1}} = a x_0^k + g eps_{k+1}`` with
fresh noise (``stochastic``) or with the noise that x_0^k implies (``deterministic``). Sampling, training, evaluation
and export share this definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf_t2i.algorithm import rng
from rlhf_t2i.algorithm.schedules import Schedule
from rlhf_t2i.utils.device import send

Transition = Literal["stochastic", "deterministic"]
StartNoise = Literal["unit", "sigma"]
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(x_t [b, ...], t [b], samples [b]) -> D(x_t)``; ``samples`` are the positions in the batch that are asked for."""
Noise = Callable[[int], Tensor]
"""Noise [B, ...] number k: 0 is where sampling starts, k > 0 enters the move to step k + 1."""


def keyed_noise(shape: Sequence[int], keys: Sequence[rng.Key], device: torch.device) -> Noise:
    """Noises that are functions of each sample's key: they do not depend on batches or ranks.

    Args:
        shape: Of one sample.
        keys: One per sample; the key itself draws noise 0.
        device: Where the noises are put.
    """

    def noise(k: int) -> Tensor:
        named = keys if k == 0 else [(*key, f"step {k}") for key in keys]
        return send(rng.normal(shape, named), device)

    return noise


def sequential_noise(
    shapes: Sequence[Sequence[int]], generators: Sequence[torch.Generator], device: torch.device
) -> Noise:
    """The noises that a diffusers pipeline draws from one ``torch.Generator`` per image.

    Args:
        shapes: Of one sample's noise 0 and of its later noises.
        generators: One per sample.
        device: Where the noises are put.
    """
    drawn: list[Tensor] = []

    def noise(k: int) -> Tensor:
        while len(drawn) <= k:
            shape = tuple(shapes[min(len(drawn), len(shapes) - 1)])
            drawn.append(torch.stack([torch.randn(shape, generator=generator) for generator in generators]))
        return send(drawn[k], device)

    return noise


@dataclass(frozen=True)
class Student:
    """How the generator is called.

    Attributes:
        schedule: Its noise schedule.
        timesteps: ``tau_1 > ... > tau_K`` in thousandths.
        transition: How it moves from one step to the next.
        input: ``unit``: the first step gets unit noise z. ``sigma``: it gets ``g_{tau_1} z`` (SiD-LSG).
    """

    schedule: Schedule
    timesteps: tuple[float, ...]
    transition: Transition = "stochastic"
    input: StartNoise = "unit"

    @property
    def steps(self) -> int:
        """K."""
        return len(self.timesteps)

    def sample(self, predict: Predict, noise: Noise) -> Tensor:
        """x_0 [B, ...] after all K steps."""
        start = noise(0)
        return self.rollout(predict, noise, torch.full((len(start),), self.steps))

    def rollout(self, predict: Predict, noise: Noise, depths: Tensor) -> Tensor:
        """``x_0^k`` of every sample at its own depth k: backward simulation (DMD2).

        The steps before a sample's last one run without a graph. The last steps of all samples are one call of
        ``predict``, with a graph where gradients are enabled: the gradient reaches step k alone.

        Args:
            predict: The generator's denoiser.
            noise: Every noise of the batch.
            depths: k in 1..K of every sample [B], int64 on the CPU.
        """
        x, t = self._last_inputs(predict, noise, depths)
        return predict(x, t, torch.arange(len(x)))

    def sample_depths(self, keys: Sequence[rng.Key]) -> Tensor:
        """K uniform in 1..K for every key [B]: which step of a sample is trained."""
        if self.steps == 1:
            return torch.ones(len(keys), dtype=torch.int64)
        return rng.timesteps(1, self.steps, keys)

    def times(self, depths: Tensor, device: torch.device) -> Tensor:
        """``tau_k`` [B] for the depths; integers where all timesteps are whole numbers."""
        whole = all(float(tau).is_integer() for tau in self.timesteps)
        taus = torch.tensor(self.timesteps, dtype=torch.int64 if whole else torch.float64)
        return send(taus[depths - 1], device)

    @torch.no_grad()
    def _last_inputs(self, predict: Predict, noise: Noise, depths: Tensor) -> tuple[Tensor, Tensor]:
        """The state and timestep with which every sample enters its last step."""
        x = self._start(noise(0))
        for k in range(1, self.steps):
            # Never empty: under ZeRO-3 every call gathers weights from all ranks, so all ranks must call as often.
            samples = (depths > k).nonzero()[:, 0]
            chosen = samples if len(samples) else torch.zeros(1, dtype=torch.int64)
            here = send(chosen, x.device)
            t = self.times(torch.full((len(chosen),), k), x.device)
            x0 = predict(x[here], t, chosen)
            if len(samples):
                x = x.index_copy(0, here, self._move(x[here], x0, k, noise(k)[here] if self._noisy else None))
        return x, self.times(depths, x.device)

    @property
    def _noisy(self) -> bool:
        return self.transition == "stochastic"

    def _start(self, z: Tensor) -> Tensor:
        if self.input == "unit":
            return z
        _, sigma = self.schedule.coefficients(self.times(torch.ones(len(z), dtype=torch.int64), z.device), z)
        return sigma * z

    def _move(self, x: Tensor, x0: Tensor, k: int, fresh: Tensor | None) -> Tensor:
        """From step k (counted from 1) to step k + 1."""
        count = len(x)
        here, there = (self.times(torch.full((count,), step), x.device) for step in (k, k + 1))
        noise = self.schedule.noise(x0, x, here) if fresh is None else fresh
        return self.schedule.add_noise(x0, noise, there)
