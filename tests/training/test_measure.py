"""What is drawn and measured for previews, the watch and the table: noise by image, distances and sums by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_t2i.algorithm import rng
from rlhf_t2i.evaluation import measure
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training.hacking import Watch
from rlhf_t2i.utils import stats


class Recorder:
    """A cluster that notes which noise it was asked for."""

    def __init__(self) -> None:
        self.keys: list[rng.Key] = []

    def sample(self, prompts: Sequence[str], keys: Sequence[rng.Key], weights: str) -> Tensor:
        self.keys += keys
        return torch.tensor([float(prompt) for prompt in prompts]).reshape(-1, 1, 1, 1)

    def rewards(self, latents: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"r": 2 * latents.flatten()}


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_image_i_has_noise_i_whatever_the_batches(size: int) -> None:
    """Also in the last, smaller batch."""
    cluster: Any = Recorder()
    drawn = measure.draw(cluster, ["0", "1", "2", "3", "4"], "raw", size)
    assert cluster.keys == [(0, "evaluation", i) for i in range(5)]
    assert drawn.latents.flatten().tolist() == [0, 1, 2, 3, 4]
    assert drawn.scores == {"r": [0, 2, 4, 6, 8]}


def test_diversity_is_a_root_mean_square_distance_within_a_prompt() -> None:
    latents = torch.stack([torch.full((4, 2, 2), value) for value in (0.0, 1.0, 3.0, 7.0, 5.0)])
    # Pairs of a: 1, 3 and 2; of b: 2; one image of c has no pair.
    found = measure.latent_distance(torch.cat([latents, latents[:1]]), ["a", "a", "a", "b", "b", "c"])
    assert found == pytest.approx([2.0, 2.0])


def test_the_watched_reward_is_the_scaled_one(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    drawn = measure.Drawn(["a", "a", "b", "b"], torch.randn(4, 4, 2, 2), {"pickscore": [0.1, 0.3, 0.4, 0.4]})
    metrics, _ = Watch(tmp_path / "watch.jsonl", make_recipe()).take(0, drawn)
    assert metrics["watch/reward"] == pytest.approx(100 * 0.3)


def test_an_exact_ratio_has_no_error() -> None:
    before = [1.0, 2.0, 4.0]
    kept = stats.ratio(before, [0.5 * value for value in before])
    assert (kept.value, kept.error) == (0.5, 0.0)
