"""``surrogate``: it learns a scorer without a gradient, knows when it is wrong, and repeats bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins import Options, Reward, registry
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.roles.reward_failure import RewardFailure
from rlhf_t2i.tools.reward_check import check_reward
from tests.rewards import builders

FILE = str(Path(__file__))
CPU = torch.device("cpu")
NAMES = ("a cat", "a dog on a hill", "trees", "a red fox", "an owl", "a bee", "the sea", "a hat")


class RednessOptions(Options):
    sign: float = 1.0
    noise: bool = False


class Redness(Reward):
    """A scorer without a gradient."""

    Options = RednessOptions
    options: RednessOptions
    differentiable = False
    uses_prompt = False
    unit = "red"
    calls: list[int] = []  # noqa: RUF012 - of all instances
    fall = 0.0

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        Redness.calls.append(len(prompts))
        red = (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2)).numpy()  # leaves torch
        if self.options.noise:
            red = [hash_of(image) for image in images]
        return torch.tensor([self.options.sign * float(value) - self.fall for value in red])


def hash_of(image: Tensor) -> float:
    """A value without relation to what the picture shows."""
    return float((image.double() * 1e4).sum() % 1)


class Lower(Redness):
    higher_is_better = False


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(builders.write_clip(tmp_path_factory.mktemp("clip")))


def build(clip_folder: str, of: str = "Redness", scorer: dict[str, Any] | None = None, **options: Any) -> Any:
    wrapped = {"name": f"{FILE}:{of}", "options": scorer or {}}
    settings = {"warmup": 4, "updates": 10, "window": 64, "lr": 3e-3, "weight_decay": 0.01, "noise": 0.1}
    built = registry.reward("surrogate", of=wrapped, features=clip_folder, **(settings | options))
    return built.eval().requires_grad_(False)


def samples(lesson: int) -> tuple[Tensor, list[str]]:
    draw = torch.Generator().manual_seed(lesson)
    tint = torch.rand(16, 3, 1, 1, generator=draw)
    images = (tint + 0.1 * torch.rand(16, 3, 32, 32, generator=draw)) / 1.1
    return (images * 255).round() / 255, [name for name in NAMES for _ in range(2)]


def teach(reward: Any, first: int, last: int) -> Any:
    for lesson in range(first, last):
        report = reward.learn(lesson, *samples(lesson), seed=lesson)
    return report


@pytest.fixture(scope="module")
def taught(clip_folder: str) -> Any:
    """A surrogate after 24 lessons, and the last one's report."""
    reward = build(clip_folder)
    return reward, teach(reward, 0, 24)


def test_it_learns_the_scorers_order_and_its_gradient_raises_the_score(taught: Any) -> None:
    reward, report = taught
    assert report.metrics["rank_correlation"] > 0.6
    assert report.metrics["pull"] == 1.0
    images, prompts = samples(99)
    role = RewardRole({"s": reward}, builders.Identity(), device=CPU)
    gradient = role.value_and_grad(images, prompts)["s"][1]
    moved = (images + 0.02 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None] * 55).clamp(0, 1)
    assert float((Redness().score(moved, prompts) - Redness().score(images, prompts)).mean()) > 0
    scores = role.score(images, prompts)
    assert set(scores) == {"s", "s (predicted)"}
    assert torch.allclose(scores["s"], Redness().score(images, prompts), atol=2e-3)
    assert float(torch.corrcoef(torch.stack([scores["s"], scores["s (predicted)"]]))[0, 1]) > 0.6
    assert reward.unit == "red"


def test_each_sample_by_itself_and_a_gradient_that_is_right(taught: Any) -> None:
    reward, _ = copy.deepcopy(taught)
    role = RewardRole({"s": reward}, builders.Identity(), device=CPU, dtype=torch.float64)
    images, prompts = samples(98)
    images = images[:2].double()
    value, gradient = role.value_and_grad(images, prompts[:2])["s"]
    alone = role.value_and_grad(images[1:], prompts[1:2])["s"]
    assert torch.allclose(value[1:].double(), alone[0].double(), atol=1e-6)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ahead, behind = (reward.score(images + s * 1e-5 * direction, prompts[:2]) for s in (1, -1))
    expected = (gradient.double() * direction).flatten(1).sum(1)
    assert torch.allclose((ahead - behind) / 2e-5, expected, rtol=1e-3, atol=1e-8)


def test_half_the_lessons_then_its_state_gives_the_same_as_all(clip_folder: str, tmp_path: Path) -> None:
    whole, first = build(clip_folder), build(clip_folder)
    teach(whole, 0, 4)
    teach(first, 0, 2)
    role = RewardRole({"s": first}, builders.Identity(), device=CPU)
    role.save("s", str(tmp_path / "state.pt"))
    second = build(clip_folder)
    RewardRole({"s": second}, builders.Identity(), device=CPU).load("s", str(tmp_path / "state.pt"))
    report = teach(second, 2, 4)
    assert report == teach_again(clip_folder)
    images, prompts = samples(50)
    assert torch.equal(whole.score(images, prompts), second.score(images, prompts))
    assert torch.equal(whole._replay.images, second._replay.images)
    with pytest.raises(ValueError, match="lesson 7 cannot follow 4 lessons"):
        teach(second, 7, 8)


def teach_again(clip_folder: str) -> Any:
    return teach(build(clip_folder), 0, 4)


def test_it_pauses_with_a_warning_when_it_cannot_order_fresh_samples(clip_folder: str) -> None:
    reward = build(clip_folder, scorer={"noise": True}, pause_below=0.5, full_above=0.6)
    reports = [reward.learn(lesson, *samples(lesson), seed=lesson) for lesson in range(8)]
    told = [(number, text) for number, report in enumerate(reports) for text in report.warnings]
    assert [number for number, _ in told] == [4]  # once, at the end of the warm-up
    assert "is paused: on fresh samples its rank correlation" in told[0][1]
    gradient = RewardRole({"s": reward}, builders.Identity(), device=CPU).value_and_grad(*samples(9))["s"][1]
    assert float(gradient.abs().max()) == 0.0


def test_the_pull_shrinks_between_the_thresholds_and_returns(clip_folder: str) -> None:
    reward = build(clip_folder, warmup=2, pause_below=0.0)
    teach(reward, 0, 1)
    reward._pairs = [1] * 13 + [-1] * 12  # 0.04
    (text,) = reward._set_pull(5)
    assert "pulls again: on fresh samples its rank correlation" in text
    assert "is 0.04, and it overvalues them by 0.00" in text
    assert reward.pull == pytest.approx(0.4)
    reward._pairs = [1] * 12 + [-1] * 13
    (text,) = reward._set_pull(6)
    assert "is paused" in text
    assert reward._set_pull(7) == ()
    assert reward.pull == 0.0


def test_a_generator_that_exploits_it_pauses_it_though_the_order_is_right(taught: Any) -> None:
    """All fresh samples are worth less than predicted; once it has learned that, it pulls again."""
    reward, _ = copy.deepcopy(taught)
    reward.scorer.fall = 0.5
    fallen = reward.learn(24, *samples(24), seed=24)
    assert fallen.metrics["rank_correlation"] > 0.6
    told = [*fallen.warnings]
    for lesson in range(25, 60):
        report = reward.learn(lesson, *samples(lesson), seed=lesson)
        told += report.warnings
    paused, resumed = told
    assert "is paused: " in paused
    assert "pulls again: " in resumed
    assert report.metrics["pull"] > 0


def test_equal_scores_are_no_order(clip_folder: str) -> None:
    """A scorer that values every sample alike teaches nothing; the reward says so and does not pull."""
    reward = build(clip_folder, scorer={"sign": 0.0}, warmup=2, updates=2)
    reports = [reward.learn(lesson, *samples(lesson), seed=lesson) for lesson in range(4)]
    assert [len(report.warnings) for report in reports] == [0, 0, 1, 0]
    assert "is paused: " in reports[2].warnings[0]
    assert "has ordered 0 pairs of fresh samples of a prompt, not 16" in reports[2].warnings[0]
    assert "rank_correlation" not in reports[3].metrics
    assert reports[3].metrics["pull"] == 0.0
    assert bool(reward.score(*samples(3)).isfinite().all())


def test_calls_are_batched_counted_and_not_repeated(
    clip_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images, prompts = samples(1)
    reward = build(clip_folder, batch=6, cache=True)
    calls = type(reward.scorer).calls  # of the file, which is loaded as a module of its own
    calls.clear()
    assert reward.learn(0, images, prompts, seed=0).metrics["scored"] == 16
    assert calls == [6, 6, 4]
    again = reward.true_score(images, prompts)
    assert calls == [6, 6, 4]
    another = build(clip_folder, cache=True)  # a later run
    assert torch.equal(another.true_score(images, prompts), again)
    assert calls == [6, 6, 4]
    negative = build(clip_folder, scorer={"sign": -1.0}, cache=True)
    assert torch.equal(negative.true_score(images, prompts), -again)  # another scorer: not from the file
    assert float(another.true_score(images, ["a new prompt"] * 16)[0]) == float(again[0])
    assert calls[3:] == [16, 16]
    assert (tmp_path / "cache/rlhf-t2i/scores.sqlite").is_file()


def test_a_buffer_forgets_its_oldest_prompts(clip_folder: str) -> None:
    reward = build(clip_folder, buffer=12, updates=1)
    report = teach(reward, 0, 3)
    assert report.metrics["buffer"] == 24
    assert reward._replay.keys[0] == "1.4"
    assert reward._replay.keys[-1] == "2.7"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"of": {"name": "cfg_implicit"}}, "cannot wrap 'cfg_implicit', which scores latents"),
        ({"of": {"name": "surrogate", "options": {"of": {"name": "http"}}}}, "which learns itself"),
        ({"of": {"name": f"{FILE}:Lower"}}, "which is better when lower"),
        ({"of": {"name": "htp"}}, "unknown reward 'htp'; did you mean 'http'"),
        ({"of": {"name": "http", "options": {"url": "ftp://x"}}}, "of 'http'.*must start with http"),
        ({"of": {"name": "http", "options": {"url": "https://example.com/s"}}}, "would send prompts and images"),
        ({"of": {"name": "http"}, "pause_below": 0.5}, "pause_below 0.5 must be less than full_above 0.1"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_in_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        registry.reward("surrogate", **options)


def test_a_scorer_that_fails_in_a_lesson_is_named(clip_folder: str) -> None:
    reward = build(clip_folder, scorer={"sign": float("nan")})
    role = RewardRole({"s": reward}, builders.Identity(), device=CPU)
    with pytest.raises(RewardFailure, match=r"reward 's' failed .*not 16 finite ones"):
        role.learn("s", 0, *samples(0), 0)


def test_rewards_check_tests_the_scorer_and_tells_what_training_needs(clip_folder: str) -> None:
    findings = {finding.name: finding for finding in check_reward(build(clip_folder), CPU, size=32)}
    assert [f"{f.name}: {f.detail}" for f in findings.values() if f.outcome == "fail"] == []
    assert findings["gradient"].outcome == "skip"
    assert "values 64 images before the first update" in findings["training"].detail
    assert "and 16 per update" in findings["training"].detail
    assert [f.name for f in check_reward(Redness(RednessOptions()), CPU, size=32)][-1] == "memory"
