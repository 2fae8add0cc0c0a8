"""What a run measures is what its table reads: a reward whose low values are good gains by falling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_t2i.algorithm.prompts import PromptStream
from rlhf_t2i.evaluation import compare
from rlhf_t2i.evaluation.held_out import HeldOut
from rlhf_t2i.recipe import reading

ROOT = Path(__file__).parents[2]
REWARD = """
from rlhf_t2i.plugins import Reward
class Noise(Reward):
    unit = "levels"
    higher_is_better = {}
"""


class Scores:
    """The roles of a run, as far as measuring asks: every image gets the next score."""

    def __init__(self, level: float) -> None:
        self.level = level

    def sample(self, prompts, keys, weights):
        return torch.stack([torch.full((1, 2, 2), float(index)) for *_, index in keys])

    def rewards(self, latents, prompts):
        return {"noise": self.level + 0.01 * latents[:, 0, 0, 0]}

    def decode(self, latents):
        return torch.zeros(len(latents), 3, 8, 8)


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_fall_is_judged_by_the_rewards_direction(higher_is_better: bool, tmp_path: Path) -> None:
    (tmp_path / "noise.py").write_text(REWARD.format(higher_is_better), "utf-8")
    reward = f"{{name: {tmp_path / 'noise.py'}:Noise, label: noise}}"
    settings = ["evaluation={images: 12, images_per_prompt: 2}", f"algorithm.rewards=[{reward}]"]
    recipe = reading.load(ROOT / "recipes/quickstart.yaml", [*settings, "algorithm.eval_rewards=[]"])
    prompts = PromptStream([f"prompt {index}" for index in range(6)], 0, "held out")
    for when, level in (("before", 1.0), ("after", 0.5)):
        folder = tmp_path / "evaluation" / when
        HeldOut(recipe, Scores(level), prompts).evaluate("raw", 0, folder, lambda done, total: None)
    row = compare.of_run(tmp_path / "evaluation").rows[0]
    assert row.unit == "levels"
    assert row.difference == pytest.approx(-0.5)
    assert row.outcome == ("no" if higher_is_better else "yes")
