"""What ``surrogate`` learns with: a small network on frozen CLIP features, its replay buffer, and one lesson's fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_t2i.plugins.precision import Float32

_TEXT_WIDTH = 64


class Head(Float32):
    """The value of an image for a prompt, from their CLIP vectors: a linear map and a small MLP on ``[f, f * t]``.

    What the prompt alone explains has a network of its own: it is most of a scorer's variance, and has no gradient in
    the image. Inputs and values are standardized with the buffer's statistics, which are part of the state.

    Args:
        size: D, of the vectors.
        width: Of the MLP.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # the same network in every run
            torch.manual_seed(0)
            self.of_prompt = nn.Sequential(nn.Linear(size, _TEXT_WIDTH), nn.SiLU(), nn.Linear(_TEXT_WIDTH, 1))
            self.linear = nn.Linear(2 * size, 1)
            self.mlp = nn.Sequential(nn.Linear(2 * size, width), nn.SiLU(), nn.Linear(width, 1))
        for last in (self.linear, self.mlp[2]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        for name in ("image_mean", "text_mean"):
            self.register_buffer(name, torch.zeros(size))
        for name in ("image_std", "text_std"):
            self.register_buffer(name, torch.ones(size))
        self.register_buffer("value_mean", torch.zeros(()))
        self.register_buffer("value_std", torch.ones(()))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Values [B] in the scorer's unit, of unit vectors [B, D]."""
        return self.value_mean + self.value_std * self.standardized(self.scaled(image), text)

    def scaled(self, image: Tensor) -> Tensor:
        """Image vectors [..., D], each entry with mean 0 and deviation 1 over the buffer."""
        return (image - self.image_mean) / self.image_std

    def standardized(self, scaled: Tensor, text: Tensor) -> Tensor:
        """Standardized values [B] of scaled image vectors and unit text vectors [B, D]."""
        words = (text - self.text_mean) / self.text_std
        both = torch.cat([scaled, scaled * words], 1)
        return (self.of_prompt(words) + self.linear(both) + self.mlp(both))[:, 0]

    @torch.no_grad()
    def set_statistics(self, images: Tensor, texts: Tensor, values: Tensor) -> None:
        """Take the statistics of the buffer: image vectors [N, D], text vectors [G, D], values [N]."""
        for name, vectors in (("image", images), ("text", texts)):
            getattr(self, f"{name}_mean").copy_(vectors.mean(0))
            # One prompt alone has no deviation.
            getattr(self, f"{name}_std").copy_(vectors.std(0, unbiased=False).clamp(min=1e-3))
        self.value_mean.copy_(values.mean())
        spread = values.std(unbiased=False)
        self.value_std.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))


@dataclass
class Replay:
    """Scored samples of the generator, a row per prompt of a lesson; the oldest go first.

    Attributes:
        capacity: Rows.
        images: CLIP vectors [G, k, D] of the k images of each prompt.
        values: The scorer's values [G, k].
        prompts: G prompts.
        keys: Of every row, ``lesson.row``.
    """

    capacity: int
    images: Tensor = field(default_factory=lambda: torch.zeros(0))
    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    prompts: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def add(self, lesson: int, images: Tensor, values: Tensor, prompts: Sequence[str]) -> None:
        """Add a lesson's rows; shapes as above."""
        new = self.prompts != []
        self.images = (torch.cat([self.images, images]) if new else images)[-self.capacity :]
        self.values = (torch.cat([self.values, values]) if new else values)[-self.capacity :]
        self.prompts = [*self.prompts, *prompts][-self.capacity :]
        self.keys = [*self.keys, *(f"{lesson}.{row}" for row in range(len(prompts)))][-self.capacity :]

    @property
    def within(self) -> float:
        """The standard deviation of the values within a prompt; 0 if all are equal."""
        return float((self.values - self.values.mean(1, keepdim=True)).std(unbiased=False))

    def state(self) -> dict[str, object]:
        """For a checkpoint."""
        return {"images": self.images, "values": self.values, "prompts": self.prompts, "keys": self.keys}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self.images, self.values = state["images"], state["values"]
        self.prompts, self.keys = list(state["prompts"]), list(state["keys"])


@dataclass(frozen=True)
class Fit:
    """How a lesson fits the head.

    Attributes:
        updates: Of the optimizer.
        rows: Prompts per update; half of them are drawn from the newest ``recent``, as the generator moves.
        recent: See above.
        rank_weight: Of the pairwise term beside the regression.
        noise: Standard deviation of noise on scaled image vectors: some hundred samples are soon learned by heart.
    """

    updates: int
    rows: int
    recent: int
    rank_weight: float
    noise: float

    def run(
        self, head: Head, optimizer: torch.optim.Optimizer, replay: Replay, texts: Tensor, seed: int
    ) -> float:  # fmt: skip
        """Fit, with draws from ``seed`` alone; returns the mean loss of the updates.

        Args:
            head: Trained in place.
            optimizer: Of its parameters.
            replay: The samples.
            texts: Text vectors [G, D] of its prompts.
            seed: Of rows and noise.
        """
        draw = torch.Generator().manual_seed(seed)
        scale = float(head.value_std) / (replay.within or 1.0)
        total_rows, half = len(replay.prompts), self.rows // 2
        newest = max(total_rows - self.recent, 0)
        total = 0.0
        for _ in range(self.updates):
            old = torch.randint(total_rows, (self.rows - half,), generator=draw)
            new = torch.randint(newest, total_rows, (half,), generator=draw)
            rows = torch.cat([old, new]).to(texts.device)
            images, values = head.scaled(replay.images[rows]), replay.values[rows]
            noise = torch.randn(images.shape, generator=draw).to(images)
            words = texts[rows].repeat_interleave(images.shape[1], 0)
            found = head.standardized((images + self.noise * noise).flatten(0, 1), words).reshape(values.shape)
            loss = F.mse_loss(found, (values - head.value_mean) / head.value_std)
            loss = loss + self.rank_weight * ranking(found * scale, values)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        return total / max(self.updates, 1)


def ranking(found: Tensor, values: Tensor) -> Tensor:
    """Bradley-Terry's loss of all pairs of a prompt's images [R, k], the mean; equal values say nothing."""
    order = (values[:, :, None] - values[:, None]).sign()
    ahead = (found[:, :, None] - found[:, None])[order > 0]
    return F.softplus(-ahead).mean() if len(ahead) else found.sum() * 0


def concordance(found: Tensor, values: Tensor) -> list[int]:
    """1 per pair of a prompt's images that both order alike, -1 per pair the other way; [R, k] each.

    Pairs that the scorer values equally are left out; one that only the prediction does counts 0. Their mean is a rank
    correlation within prompts, Kendall's tau.
    """
    first, second = torch.triu_indices(found.shape[1], found.shape[1], 1)
    order = (values[:, first] - values[:, second]).sign()
    agree = order * (found[:, first] - found[:, second]).sign()
    return [int(a) for a in agree[order != 0].tolist()]
