"""A person picks the better of two images of one prompt, on a page that this process serves on loopback.

The values are Bradley-Terry's: the log-odds with which an image is preferred, per prompt, with a Gaussian prior. They
have no gradient; ``surrogate`` learns them from few comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from pydantic import Field
from rlhf_t2i_plugins.rewards.human_page import Answer, Comparison, ComparisonServer
from torch import Tensor

from rlhf_t2i import plugins
from rlhf_t2i.utils.images import png


class HumanOptions(plugins.Options):
    """The page, and how many comparisons are asked for."""

    port: int = Field(8765, ge=0, le=65_535, description="of http://127.0.0.1:PORT; 0: any free one")
    pairs_per_prompt: int = Field(8, ge=1, le=10_000, description="comparisons per prompt and call, at most")
    question: str = Field("Which image shows this better?", max_length=200, description="above the images")
    prior: float = Field(1.0, gt=0, le=1e6, description="precision of the values' Gaussian prior")


class Human(plugins.Reward):
    """Log-odds of preference, with mean 0 over the images of a prompt in a call; a call needs two of each prompt."""

    Options = HumanOptions
    options: HumanOptions
    differentiable = False
    unit = "log-odds"
    license = "the person's"

    def __init__(self, options: HumanOptions | None = None) -> None:
        super().__init__(options)
        self._server: ComparisonServer | None = None

    @classmethod
    def hub_models(cls, options: HumanOptions) -> list[str]:
        """None."""
        return []

    @classmethod
    def compares(cls, options: HumanOptions) -> bool:
        """It does."""
        return True

    @property
    def url(self) -> str:
        """The page's address; the server is started if it does not run."""
        if self._server is None:
            self._server = ComparisonServer(self.options.port, self.options.question)
        return self._server.url

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values [B] of images [B, 3, H, W] in [0, 1]; waits until a person has compared them.

        Raises:
            ValueError: A prompt with one image alone, which there is nothing to compare with.
            RunError: The port is taken.
        """
        members: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            members.setdefault(prompt, []).append(index)
        alone = next((prompt for prompt, indices in members.items() if len(indices) < 2), None)
        if alone is not None:
            raise ValueError(f"one image alone of the prompt {alone!r}: people compare two of a prompt")
        files = [png(image) for image in images]
        asked = [pair for indices in members.values() for pair in pairs(indices, self.options.pairs_per_prompt)]
        _ = self.url
        assert self._server is not None
        answers = self._server.ask([Comparison(prompts[a], files[a], files[b]) for a, b in asked])
        values = bradley_terry(len(images), asked, answers, self.options.prior)
        for indices in members.values():
            values[indices] -= values[indices].mean()
        return torch.tensor(values, dtype=torch.float32, device=images.device)


def pairs(indices: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Pairs of images, neighbors first, so that few comparisons connect all; each side is shown first as often."""
    found = sorted(combinations(range(len(indices)), 2), key=lambda pair: (pair[1] - pair[0], pair))[:most]
    return [
        (indices[a], indices[b]) if number % 2 == 0 else (indices[b], indices[a])
        for number, (a, b) in enumerate(found)
    ]  # fmt: skip


def bradley_terry(
    count: int, compared: Sequence[tuple[int, int]], answers: Sequence[Answer], prior: float
) -> np.ndarray:
    """The most likely log-odds [count] under a Gaussian prior of precision ``prior`` (Bradley and Terry 1952).

    A tie counts as half a win for each. The posterior is log-concave: Newton's method finds its maximum.
    """
    values = np.zeros(count)
    wins = np.array([{"left": 1.0, "right": 0.0, "equal": 0.5}[answer] for answer in answers])
    first, second = (np.array([pair[side] for pair in compared], dtype=int) for side in (0, 1))
    for _ in range(50):
        likely = 1 / (1 + np.exp(values[second] - values[first]))
        gradient, curvature = -prior * values, prior * np.eye(count)
        np.add.at(gradient, first, wins - likely)
        np.add.at(gradient, second, likely - wins)
        weight = likely * (1 - likely)
        for rows, columns, sign in ((first, first, 1), (second, second, 1), (first, second, -1), (second, first, -1)):
            np.add.at(curvature, (rows, columns), sign * weight)
        step = np.linalg.solve(curvature, gradient)
        values = values + step
        if np.abs(step).max() < 1e-10:
            break
    return values
