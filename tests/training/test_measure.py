"""What a run draws of its held-out prompts: noise by image, distances and sums by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_t2i.algorithm import rng
from rlhf_t2i.algorithm.prompts import PromptStream
from rlhf_t2i.evaluation import results
from rlhf_t2i.evaluation.held_out import HeldOut, Samples
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training.hacking import HackingMonitor
from rlhf_t2i.utils import stats

MakeRecipe = Callable[..., Recipe]


class Recorder:
    """A cluster that notes which noise it was asked for."""

    def __init__(self) -> None:
        self.keys: list[rng.Key] = []

    def sample(self, prompts: Sequence[str], keys: Sequence[rng.Key], weights: str) -> Tensor:
        self.keys += keys
        return torch.tensor([float(prompt) for prompt in prompts]).reshape(-1, 1, 1, 1)

    def rewards(self, latents: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"pickscore": 2 * latents.flatten()}

    def decode(self, latents: Tensor) -> Tensor:
        return torch.rand(len(latents), 3, 400, 200)


def held_out(recipe: Recipe) -> tuple[HeldOut, Recorder]:
    cluster: Any = Recorder()
    return HeldOut(recipe, cluster, PromptStream(["0", "1", "2", "3", "4"], 0, "held out")), cluster


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_image_i_has_noise_i_whatever_the_batches(size: int, make_recipe: MakeRecipe) -> None:
    """Also in the last, smaller batch."""
    drawer, cluster = held_out(make_recipe(evaluation__batch_size=size))
    samples = drawer.draw(["0", "1", "2", "3", "4"], "raw")
    assert cluster.keys == [(0, "evaluation", i) for i in range(5)]
    assert samples.latents.flatten().tolist() == [0, 1, 2, 3, 4]
    assert samples.scores == {"pickscore": [0, 2, 4, 6, 8]}


def test_an_evaluation_writes_results_and_thumbnails(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    drawer, _ = held_out(make_recipe(evaluation="{images: 6, images_per_prompt: 2, batch_size: 4}"))
    told: list[tuple[int, int]] = []
    samples = drawer.evaluate("raw", 7, tmp_path, lambda done, total: told.append((done, total)))
    assert told == [(4, 6), (6, 6)]
    found = results.read(tmp_path)
    assert found is not None
    assert (found.step, found.prompts) == (7, samples.prompts)
    assert found.metrics["pickscore"].by_image == samples.scores["pickscore"]
    assert found.metrics["latent_distance"].by_prompt == [0, 0, 0]
    from PIL import Image

    assert [Image.open(tmp_path / file).size for file in found.images] == [(128, 256)] * 6


def test_monitors_draw_whole_prompts(make_recipe: MakeRecipe) -> None:
    settings = "{images: 12, images_per_prompt: 3, batch_size: 4}"
    for wanted, count in ((12, 12), (11, 9), (3, 3), (2, 2)):
        drawer, _ = held_out(make_recipe(evaluation=settings, logging__watch_images=wanted))
        assert drawer.monitored() == count


def test_diversity_is_a_root_mean_square_distance_within_a_prompt(make_recipe: MakeRecipe) -> None:
    latents = torch.stack([torch.full((4, 2, 2), value) for value in (0.0, 1.0, 3.0, 7.0, 5.0, 0.0)])
    # Pairs of a: 1, 3 and 2; of b: 2; one image of c has no pair.
    metrics = Samples(["a", "a", "a", "b", "b", "c"], latents, {"pickscore": [0.0] * 6}).metrics(make_recipe())
    assert metrics["latent_distance"].by_prompt == pytest.approx([2.0, 2.0])


def test_the_watched_reward_is_the_scaled_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    samples = Samples(["a", "a", "b", "b"], torch.randn(4, 4, 2, 2), {"pickscore": [0.1, 0.3, 0.4, 0.4]})
    metrics, _ = HackingMonitor(tmp_path / "watch.jsonl", make_recipe()).update(0, samples)
    assert metrics["watch/reward"] == pytest.approx(100 * 0.3)


def test_an_exact_ratio_has_no_error() -> None:
    before = [1.0, 2.0, 4.0]
    kept = stats.ratio(before, [0.5 * value for value in before])
    assert (kept.value, kept.error) == (0.5, 0.0)
