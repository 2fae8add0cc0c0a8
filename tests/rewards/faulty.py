"""Rewards that each break one rule, for the checks and the failure paths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_t2i import plugins


def _prompt_numbers(prompts: Sequence[str], images: Tensor) -> Tensor:
    return torch.tensor([len(p) / 10 for p in prompts], dtype=images.dtype, device=images.device)


class Good(plugins.Reward):
    """Smooth, per sample, reads the prompt."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.square().mean((1, 2, 3)) * _prompt_numbers(prompts, images)


class WrongShape(plugins.Reward):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3)).unsqueeze(1)


class NotATensor(plugins.Reward):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return [0.0] * len(prompts)  # type: ignore[return-value]


class Raises(plugins.Reward):
    """Cannot read one prompt."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if "bad" in prompts:
            raise ValueError("cannot read this")
        return images.mean((1, 2, 3))


class NotFinite(plugins.Reward):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        numbers = torch.tensor([float("inf") if p == "bad" else 1.0 for p in prompts])
        return images.mean((1, 2, 3)) * numbers


class InfiniteGradient(plugins.Reward):
    """sqrt at 0: a finite value whose gradient is not."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        zero = torch.tensor([0.0 if p == "bad" else 1.0 for p in prompts])
        return (images.mean((1, 2, 3)) * zero).sqrt()


class Detached(plugins.Reward):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.detach().mean((1, 2, 3))


class PartlyDetached(plugins.Reward):
    """Half of the dependence carries no gradient: only finite differences notice."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images * images.detach()).mean((1, 2, 3)) * _prompt_numbers(prompts, images)


class BatchMean(plugins.Reward):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        values = images.square().mean((1, 2, 3))
        return (values - values.mean()) * _prompt_numbers(prompts, images)


class Random(plugins.Reward):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3)) * _prompt_numbers(prompts, images) + torch.rand(len(prompts))


class HidesNaN(plugins.Reward):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images.square().mean((1, 2, 3)) * _prompt_numbers(prompts, images)).nan_to_num(0.0)


class Constant(plugins.Reward):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images * 0).sum((1, 2, 3)) + _prompt_numbers(prompts, images)


class IgnoresPrompt(plugins.Reward):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.square().mean((1, 2, 3))


class OutOfRange(Good):
    value_range = (-1.0, 0.0)


class Measured(Good):
    """Only measures."""

    differentiable = False
