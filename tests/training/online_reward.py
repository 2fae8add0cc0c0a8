"""A reward that learns: ridge regression of a scorer without a gradient on the mean color."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from rlhf_t2i.plugins import Lesson, OnlineReward, Options, Schedule


class LearnsOptions(Options):
    prompts: int = 2
    warmup: int = 2
    calls: str = Field("", description="a file that gets a line per call of the scorer")
    fail_at: int = Field(-1, description="the lesson that fails")
    hang_at: int = Field(-1, description="the lesson that does not end")


class Learns(OnlineReward):
    Options = LearnsOptions
    options: LearnsOptions

    def __init__(self, options: LearnsOptions | None = None) -> None:
        super().__init__(options)
        self.features, self.values = torch.zeros(0, 3), torch.zeros(0)
        self.weight = torch.zeros(3)

    @classmethod
    def schedule(cls, options: Options) -> Schedule:
        assert isinstance(options, LearnsOptions)
        return Schedule(options.prompts, 2, options.warmup)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((2, 3)) @ self.weight

    def true_score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.options.calls:
            with Path(self.options.calls).open("a") as file:
                file.write(f"{len(prompts)} {os.getpid()}\n")
        return (images[:, 0] - images[:, 2]).mean((1, 2)).round(decimals=3)

    def learn(self, lesson: int, images: Tensor, prompts: Sequence[str], seed: int) -> Lesson:
        if lesson == self.options.fail_at:
            raise ValueError("no lesson today")
        while lesson == self.options.hang_at:
            time.sleep(1)
        truth = self.true_score(images, prompts)
        noise = torch.randn(len(truth), generator=torch.Generator().manual_seed(seed)) * 1e-3
        self.features = torch.cat([self.features, images.mean((2, 3))])
        self.values = torch.cat([self.values, truth + noise])
        gram = self.features.T @ self.features + 0.1 * torch.eye(3)
        self.weight = torch.linalg.solve(gram, self.features.T @ self.values)
        self.ready = True
        warnings = ("the first lesson",) if lesson == 0 else ()
        return Lesson(float(truth.mean()), {"seen": float(len(self.values))}, warnings)

    def training_state(self) -> dict[str, object]:
        return {"features": self.features, "values": self.values, "weight": self.weight, "ready": self.ready}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        self.features, self.values, self.weight = state["features"], state["values"], state["weight"]
        self.ready = state["ready"]

    def needs(self, seconds_per_image: float) -> str:
        return "nothing"


class Watching(OnlineReward):
    """Its class alone is needed: it is refused."""

    pip = ("numpy==1.0",)

    @classmethod
    def schedule(cls, options: Options) -> Schedule:
        return Schedule(1, 2, 0)
