"""Heads, norms and cosines stay in float32 where a reward runs in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rlhf_t2i_plugins.rewards.regression_head import RegressionHead

from rlhf_t2i.plugins import registry
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.tools.reward_check import check_reward
from tests.rewards import builders, qwen_builders

CPU = torch.device("cpu")


def scores(name: str, options: dict[str, str], dtype: torch.dtype) -> torch.Tensor:
    """Of 24 images that differ a little."""
    base = builders.pictures(1, 32)
    images = (base + torch.linspace(0, 0.05, 24).reshape(-1, 1, 1, 1)).clamp(0, 1)
    role = RewardRole({"r": registry.reward(name, **options)}, builders.Identity(), device=CPU, dtype=dtype)
    return role.score(images, ["red fox"] * 24)["r"]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    root = tmp_path_factory.mktemp("precision")
    clip, head = builders.write_aesthetic(root / "aesthetic")
    return {
        "aesthetic": {"model": str(clip), "head": str(head)},
        "image_reward": {"model": str(builders.write_image_reward(root / "ir"))},
        "clip": {"model": str(clip)},
        "pickscore": {"model": str(clip), "unit": "logit"},
        "hpsv3": qwen_builders.hpsv3_options(qwen_builders.write_hpsv3(root / "hpsv3")),
        "vlm_choice": {"model": str(qwen_builders.write_vlm(root / "vlm"))},
    }


@pytest.mark.parametrize("name", ["aesthetic", "image_reward", "clip", "pickscore", "hpsv3", "vlm_choice"])
def test_bfloat16_scores_do_not_lie_on_a_grid(name: str, options: dict[str, dict[str, str]]) -> None:
    values = scores(name, options[name], torch.bfloat16)
    assert values.dtype == torch.float32
    on_the_grid = (values == values.bfloat16().float()).float().mean()
    assert on_the_grid < 0.5, values


OWN = """
import torch
from rlhf_t2i.plugins import Reward
from rlhf_t2i.plugins.precision import Float32

class Head(Float32):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, features):
        return self.layer(features)

class Mine(Reward):
    uses_prompt = False

    def __init__(self, options=None):
        super().__init__(options)
        self.head = Head()

    def score(self, images, prompts):
        return self.head(images.mean((2, 3)))[:, 0]

class Coarse(Mine):
    def __init__(self, options=None):
        super().__init__(options)
        self.head = self.head.layer
"""


@pytest.mark.parametrize(("cls", "coarse"), [("Mine", False), ("Coarse", True)])
def test_a_head_of_ones_own_follows_the_advice_of_the_docs(cls: str, coarse: bool, tmp_path: Path) -> None:
    """docs/rewards.md: put it into a Float32. Autocast made its products bfloat16 all the same."""
    (tmp_path / "own.py").write_text(OWN, "utf-8")
    name = f"{tmp_path}/own.py:{cls}"
    values = scores(name, {}, torch.bfloat16)
    assert torch.equal(values, values.bfloat16().float()) is coarse
    (row,) = [f for f in check_reward(registry.reward(name), CPU, size=32) if f.name == "dtype"]
    assert row.outcome == "pass"
    assert ("its values have 8 bits: keep the head in rlhf_t2i.plugins.precision.Float32" in row.detail) is coarse


def test_a_head_keeps_its_weights_and_computes_in_float32() -> None:
    head = RegressionHead(16)
    before = [p.clone() for p in head.parameters()]
    head.to(torch.bfloat16)
    assert all(torch.equal(p, q) for p, q in zip(head.parameters(), before, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.rand(2, 16, dtype=torch.bfloat16)).dtype == torch.float32
    assert head.double()(torch.rand(2, 16, dtype=torch.float64)).dtype == torch.float64
    assert head.to(torch.float16).layers[0].weight.dtype == torch.float64
    with torch.device("meta"):
        assert RegressionHead(16)(torch.empty(2, 16)).is_meta


def test_a_reward_that_writes_into_its_images_changes_nobody_elses_score(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from rlhf_t2i.plugins import Reward\n"
        "class Writes(Reward):\n    def score(self, images, prompts):\n"
        "        prompts.clear()\n        return images.mul_(0).mean((1, 2, 3))\n"
        "class Mean(Reward):\n    def score(self, images, prompts):\n"
        "        return images.mean((1, 2, 3)) * len(prompts)\n"
    )
    images = builders.pictures(2)
    rewards = {name: registry.reward(f"{tmp_path}/mine.py:{name}") for name in ("Writes", "Mean")}
    found = RewardRole(rewards, builders.Identity(), device=CPU).score_images(images, ["a", "b"])
    assert torch.equal(found["Writes"], torch.zeros(2))
    torch.testing.assert_close(found["Mean"], 2 * images.mean((1, 2, 3)))
