"""What a run draws of its held-out prompts: previews, the monitors' samples, and the before/after evaluation.

The prompts and the noise are the same every time, and in every run with the same list, so that runs compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf_t2i.algorithm.prompts import PromptStream
from rlhf_t2i.cluster.base import Cluster
from rlhf_t2i.evaluation import diversity
from rlhf_t2i.evaluation.results import Metric, Results
from rlhf_t2i.plugins import traits
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.utils import files, images, stats

_SEED = 0
_THUMBNAIL = 256  # pixels: a run keeps thumbnails, not 1024-pixel images by the hundred


@dataclass
class Samples:
    """Scored samples of the generator.

    Attributes:
        prompts: One per sample.
        latents: [B, C, h, w].
        scores: Every reward's value of every sample.
    """

    prompts: list[str]
    latents: Tensor
    scores: dict[str, list[float]]

    def first(self, count: int) -> Samples:
        """The first ``count`` samples."""
        scores = {label: values[:count] for label, values in self.scores.items()}
        return Samples(self.prompts[:count], self.latents[:count], scores)

    def by_prompt(self, label: str) -> np.ndarray:
        """A score's mean over each prompt's images [P]."""
        return stats.by_unit(self.scores[label], self.prompts)

    def metrics(self, recipe: Recipe) -> dict[str, Metric]:
        """Every reward, and the diversity of the latents within each prompt: it needs no further model."""
        measured = [
            Metric.of_images(
                reward.key, self.scores[reward.key], self.prompts, kind="train" if reward.trains else "eval",
                unit=reward.unit, higher_is_better=reward.higher_is_better,
            )
            for reward in traits.resolve(recipe).rewards
            if reward.key in self.scores
        ]  # fmt: skip
        distances = diversity.within(self.prompts, self.latents.flatten(1).double().numpy(), diversity.rms_distance)
        measured.append(Metric.of_prompts("latent_distance", distances))
        return {metric.key: metric for metric in measured}


@dataclass
class HeldOut:
    """Draws a run's held-out prompts.

    Args:
        recipe: The recipe.
        cluster: The roles.
        stream: The held-out prompts, or the training prompts where there are none.
    """

    recipe: Recipe
    cluster: Cluster
    stream: PromptStream

    def prompts(self) -> list[str]:
        """The prompts of the evaluation, one per image."""
        settings = self.recipe.evaluation
        distinct = self.stream.batch(0, -(-settings.images // settings.images_per_prompt))
        return [prompt for prompt in distinct for _ in range(settings.images_per_prompt)][: settings.images]

    def monitored(self) -> int:
        """How many images the monitors draw: whole prompts, as far as ``logging.watch_images`` allows."""
        settings = self.recipe.evaluation
        count = min(self.recipe.logging.watch_images, settings.images)
        return max(count - count % settings.images_per_prompt, 2)

    def preview(self, weights: str, path: Path) -> None:
        """Write a grid of samples of the first prompts."""
        prompts = self.stream.batch(0, self.recipe.logging.sample_count)
        keys = [(_SEED, "preview", index) for index in range(len(prompts))]
        drawn = self.cluster.decode(self.cluster.sample(prompts, keys, weights))
        files.write_atomic(path, images.png(images.grid([images.to_pil(image) for image in drawn])))

    def draw(
        self,
        prompts: Sequence[str],
        weights: str,
        each: Callable[[int, Tensor], None] = lambda first, latents: None,
    ) -> Samples:
        """Draw and score samples.

        Args:
            prompts: One per sample.
            weights: ``raw`` or ``ema``.
            each: Called with the number of the first sample of a batch, and the batch's latents.
        """
        scores: dict[str, list[float]] = {}
        latents: list[Tensor] = []
        for first in range(0, len(prompts), self.recipe.evaluation.batch_size):
            part = prompts[first : first + self.recipe.evaluation.batch_size]
            keys = [(_SEED, "evaluation", index) for index in range(first, first + len(part))]
            x0 = self.cluster.sample(part, keys, weights)
            latents.append(x0)
            for label, values in self.cluster.rewards(x0, part).items():
                scores.setdefault(label, []).extend(float(value) for value in values)
            each(first, x0)
        return Samples(list(prompts), torch.cat(latents), scores)

    def evaluate(self, weights: str, step: int, folder: Path, progress: Callable[[int, int], None]) -> Samples:
        """Draw and score all prompts of the evaluation; write ``results.json`` and thumbnails.

        Args:
            weights: ``raw`` or ``ema``.
            step: Generator updates done.
            folder: Where to write.
            progress: Called with the number of finished images, and of all, after every batch.
        """
        prompts, names = self.prompts(), list[str]()

        def thumbnails(first: int, latents: Tensor) -> None:
            for index, image in enumerate(self.cluster.decode(latents), first):
                names.append(f"images/{index:05d}.png")
                small = images.to_pil(image)
                small.thumbnail((_THUMBNAIL, _THUMBNAIL))
                files.write_atomic(folder / names[-1], images.png(small))
            progress(len(names), len(prompts))

        samples = self.draw(prompts, weights, thumbnails)
        Results(samples.prompts, samples.metrics(self.recipe), images=names, step=step, folder=folder).write()
        return samples
