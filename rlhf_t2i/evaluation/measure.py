"""Previews and the before/after measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlhf_t2i.cluster.base import Cluster
from rlhf_t2i.plugins import registry
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.utils import files

_SEED = 0  # of previews and evaluation: the same noise in every run, so that runs compare
_THUMBNAIL = 256


def preview(cluster: Cluster, prompts: Sequence[str], weights: str, path: Path) -> None:
    """A grid of samples of the same prompts and noise every time."""
    keys = [(_SEED, "preview", i) for i in range(len(prompts))]
    images = cluster.decode(cluster.sample(prompts, keys, weights))
    columns = min(8, len(images))
    grid(images, columns).save(path)


@dataclass
class Drawn:
    """Samples of the evaluation's prompts and noise.

    Attributes:
        prompts: One a sample; samples of one prompt share it.
        latents: [B, C, h, w].
        scores: Every reward's value of every sample.
    """

    prompts: list[str]
    latents: Tensor
    scores: dict[str, list[float]]

    def first(self, count: int) -> Drawn:
        """The first ``count`` samples."""
        scores = {label: values[:count] for label, values in self.scores.items()}
        return Drawn(self.prompts[:count], self.latents[:count], scores)

    def diversity(self) -> list[float]:
        """Diversity within each prompt: the mean pairwise root-mean-square distance of its samples' latents.

        It needs no further model, and falls to zero when the noise no longer matters.
        """
        return latent_distance(self.latents, self.prompts)


def draw(
    cluster: Cluster,
    prompts: Sequence[str],
    weights: str,
    size: int,
    each: Callable[[int, Tensor], None] = lambda start, latents: None,
) -> Drawn:
    """Sample and score the evaluation's prompts.

    Args:
        cluster: The roles.
        prompts: One a sample.
        weights: Which of the generator's.
        size: Samples at once.
        each: Told the number of the first sample of a part, and the part's latents.
    """
    scores: dict[str, list[float]] = {}
    latents: list[Tensor] = []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        keys = [(_SEED, "evaluation", i) for i in range(start, start + len(part))]
        x0 = cluster.sample(part, keys, weights)
        latents.append(x0)
        for label, values in cluster.rewards(x0, part).items():
            scores.setdefault(label, []).extend(float(v) for v in values)
        each(start, x0)
    return Drawn(list(prompts), torch.cat(latents), scores)


def evaluate(
    recipe: Recipe,
    cluster: Cluster,
    prompts: Sequence[str],
    weights: str,
    step: int,
    folder: Path,
    when: str,
    tell: Callable[[str], None],
) -> Drawn:
    """Score samples of the evaluation's prompts and write ``WHEN.json`` and thumbnails."""
    names: list[str] = []
    (folder / when).mkdir(parents=True, exist_ok=True)

    def thumbnails(start: int, x0: Tensor) -> None:
        for index, image in enumerate(cluster.decode(x0), start):
            name = f"{when}/{index:05d}.png"
            picture = to_picture(image)
            picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
            picture.save(folder / name)
            names.append(name)
        tell(f"measuring {when} training: {start + len(x0)} of {len(prompts)} images")

    drawn = draw(cluster, prompts, weights, recipe.evaluation.batch_size, thumbnails)
    scores = drawn.scores
    algorithm = recipe.algorithm
    kinds = {r.key: "train" for r in algorithm.rewards} | {r.key: "eval" for r in algorithm.eval_rewards}
    choices = [*algorithm.rewards, *algorithm.eval_rewards]
    classes = {choice.key: registry.load_class(registry.REWARDS, choice.name) for choice in choices}
    options = {choice.key: choice.options for choice in choices}
    files.write_json(
        folder / f"{when}.json",
        {
            "step": step,
            "prompts": list(prompts),
            "indices": list(range(len(prompts))),
            "scores": scores,
            "kinds": {label: kinds[label] for label in scores},
            # Where the unit is an option of the reward, its class has the default.
            "units": {label: options[label].get("unit", classes[label].unit) for label in scores},
            "higher_is_better": {label: classes[label].higher_is_better for label in scores},
            "diversity": {"latent_distance": drawn.diversity()},
            "images": names,
        },
    )
    return drawn


def latent_distance(latents: Tensor, prompts: Sequence[str]) -> list[float]:
    """Mean pairwise RMS distance within each prompt (of at least two samples), in order of first appearance."""
    rows: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(index)
    flat = latents.flatten(1).double()
    scale = flat.shape[1] ** 0.5
    return [float(torch.pdist(flat[i]).mean() / scale) for i in rows.values() if len(i) > 1]


def to_picture(image: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] as a PIL image."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def grid(images: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Images [B, 3, H, W] in rows on white."""
    height, width = images.shape[-2:]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    picture = Image.fromarray(sheet)
    for index, image in enumerate(images):
        picture.paste(to_picture(image), ((index % columns) * (width + gap), (index // columns) * (height + gap)))
    return picture
