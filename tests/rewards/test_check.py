"""``rewards check``: every shipped reward passes, and each fault is caught by the check that is there for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_t2i.plugins import registry
from rlhf_t2i.plugins.base import Reward
from rlhf_t2i.tools.reward_check import check_reward
from tests.rewards import builders, faulty, qwen_builders

CPU = torch.device("cpu")


def outcomes(reward: Reward) -> dict[str, str]:
    return {finding.name: finding.outcome for finding in check_reward(reward, CPU, size=32)}


def failed(reward: Reward) -> set[str]:
    return {name for name, outcome in outcomes(reward).items() if outcome == "fail"}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reward]:
    root: Path = tmp_path_factory.mktemp("shipped")
    clip = str(builders.write_clip(root / "clip"))
    aesthetic, head = builders.write_aesthetic(root / "aesthetic")
    return {
        "pickscore": registry.reward("pickscore", model=clip),
        "clip": registry.reward("clip", model=clip, unit="logit"),
        "hpsv2": registry.reward("hpsv2", model=str(builders.write_hpsv2(root / "hps"))),
        "aesthetic": registry.reward("aesthetic", model=str(aesthetic), head=str(head)),
        "image_reward": registry.reward("image_reward", model=str(builders.write_image_reward(root / "ir"))),
        "hpsv3": registry.reward("hpsv3", **qwen_builders.hpsv3_options(qwen_builders.write_hpsv3(root / "hpsv3"))),
        "vlm_choice": registry.reward("vlm_choice", model=str(qwen_builders.write_vlm(root / "vlm"))),
        "cfg_implicit": registry.reward("cfg_implicit"),
    }


SHIPPED = ("pickscore", "clip", "hpsv2", "aesthetic", "image_reward", "hpsv3", "vlm_choice", "cfg_implicit")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_reward_passes_and_its_gradient_meets_finite_differences(
    shipped: dict[str, Reward], name: str
) -> None:
    findings = check_reward(shipped[name], CPU, size=32)
    assert [f"{f.name}: {f.detail}" for f in findings if f.outcome == "fail"] == []
    assert next(f for f in findings if f.name == "gradient").outcome == "pass"


def test_the_weightings_of_the_implicit_reward_pass() -> None:
    for weighting in ("score", "eps"):
        assert failed(registry.reward("cfg_implicit", weighting=weighting)) == set()


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (faulty.Good(), set()),
        (faulty.BatchMean(), {"batch invariance"}),
        (faulty.Random(), {"determinism"}),
        (faulty.HidesNaN(), {"NaN behavior"}),
        (faulty.PartlyDetached(), {"gradient"}),
        (faulty.Constant(), {"sees the image"}),
        (faulty.IgnoresPrompt(), {"sees the prompt"}),
        (faulty.OutOfRange(), {"value range"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Reward) else "",
)
def test_each_fault_is_caught_by_its_check(reward: Reward, expected: set[str]) -> None:
    assert failed(reward) == expected


def test_a_wrong_shape_and_a_detached_score_fail() -> None:
    assert failed(faulty.WrongShape()) == {"shape"}
    assert failed(faulty.Detached()) == {"has a gradient", "sees the prompt"}  # it does both


def test_a_missing_gradient_has_its_own_row_after_another_failure() -> None:
    class Both(faulty.BatchMean):
        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return super().score(images, prompts).detach()

    assert failed(Both()) == {"batch invariance", "has a gradient"}
    assert outcomes(Both())["time"] == "skip"


def test_a_reward_without_gradient_skips_that_check() -> None:
    found = outcomes(faulty.Measured())
    assert found["gradient"] == "skip"
    assert "fail" not in found.values()


def test_a_prompt_that_matters_contradicts_uses_prompt_false() -> None:
    class Denies(faulty.Good):
        uses_prompt = False

    assert failed(Denies()) == {"sees the prompt"}
