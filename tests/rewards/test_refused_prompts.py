"""Prompts that a reward cannot score are refused before a run or an evaluation starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rlhf_t2i_plugins.rewards.detector import DetectorOptions, DetectorReward, read_checks
from rlhf_t2i_plugins.rewards.ocr import OCR, OCROptions

from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation.run import Evaluation
from rlhf_t2i.evaluation.settings import Settings
from rlhf_t2i.families.weights import damaged_weights
from rlhf_t2i.plugins import registry
from rlhf_t2i.recipe import shipped
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import run_prompts
from rlhf_t2i.training.run import run

PICKY = """
from rlhf_t2i import plugins

class Picky(plugins.Reward):
    @classmethod
    def refuse_prompts(cls, options, prompts):
        return next((f"{p!r} is about a gold horse" for p in prompts if "gold horse" in p), None)

    def score(self, images, prompts):
        return images.mean((1, 2, 3))
"""


@pytest.fixture
def picky(tmp_path: Path) -> str:
    (tmp_path / "picky.py").write_text(PICKY, "utf-8")
    return f"{tmp_path}/picky.py:Picky"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """The last of twelve prompts, which no evaluation of eight images reaches, is refused."""
    every = [f"a red cat, number {i}" for i in range(11)]
    (tmp_path / "list.txt").write_text("\n".join([*every, "a gold horse"]), "utf-8")
    return tmp_path / "list.txt"


def test_of_a_reward_that_trains_every_prompt_is_asked(
    make_recipe: Callable[..., Recipe], picky: str, prompts: Path, tiny_prompts: Path, tmp_path: Path
) -> None:
    rewards = f"[{{name: '{picky}', options: {{}}}}]"
    recipe = make_recipe(data__prompts=str(prompts), data__held_out=str(tiny_prompts), algorithm__rewards=rewards)
    with pytest.raises(UsageError, match=r"reward 'Picky' cannot score them: 'a gold horse' is about a gold horse"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_a_reward_that_measures_those_that_are_drawn_are_asked(
    make_recipe: Callable[..., Recipe], picky: str, prompts: Path, tiny_prompts: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(
        data__prompts=str(tiny_prompts), data__held_out=str(prompts), algorithm__eval_rewards=f"[{{name: '{picky}'}}]",
        evaluation="{images: 24, images_per_prompt: 2}",
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"data\.held_out: reward 'Picky' cannot score them"):
        run(recipe, tmp_path / "out")


@pytest.mark.parametrize("held_out", [True, False])
def test_plan_refuses_what_a_run_refuses(
    make_recipe: Callable[..., Recipe], picky: str, prompts: Path, tiny_prompts: Path, held_out: bool
) -> None:
    rewards = f"[{{name: '{picky}', options: {{}}}}]"
    others = str(tiny_prompts) if held_out else "null"
    recipe = make_recipe(data__prompts=str(prompts), data__held_out=others, algorithm__rewards=rewards)
    with pytest.raises(UsageError, match=r"reward 'Picky' cannot score them: 'a gold horse' is about a gold horse"):
        run_prompts.check(recipe)


def test_an_evaluation_refuses_them_before_it_draws(tiny_sdxl: Path, picky: str, prompts: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"prompts": str(prompts), "metrics": [picky], "height": 16, "width": 16}
    with pytest.raises(UsageError, match="cannot score them: 'a gold horse'"):
        Evaluation(Settings(model=str(tiny_sdxl), **asked), tmp_path / "out", lambda *_: None)
    Evaluation(Settings(model=str(tiny_sdxl), **asked, limit=11), tmp_path / "out", lambda *_: None)


def test_a_reward_that_fails_when_asked_ends_no_evaluation_with_its_own_code(
    tiny_sdxl: Path, prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "leaves.py").write_text(
        PICKY.replace('return next((f"', 'raise SystemExit(0)\n        return next((f"')
    )
    asked: dict[str, Any] = {"prompts": str(prompts), "height": 16, "width": 16}
    with pytest.raises(UsageError, match=r"which prompts it scores cannot be told: leaves.py:7: called sys.exit"):
        Evaluation(
            Settings(model=str(tiny_sdxl), metrics=[f"{tmp_path}/leaves.py:Picky"], **asked), tmp_path, lambda *_: None
        )


def test_the_shipped_rewards_say_why(tmp_path: Path) -> None:
    quoting = 'a sign that says "OPEN"'
    assert OCR.refuse_prompts(OCROptions(), [quoting]) is None
    assert "quotes no text" in str(OCR.refuse_prompts(OCROptions(), [quoting, "an owl"]))
    named = registry.load_class(registry.REWARDS, shipped.resolve("emoji64:reader.py") + ":Named")
    assert named.refuse_prompts(named.Options(), ["owl, on a red background"]) is None
    assert "emoji64's prompts only" in str(named.refuse_prompts(named.Options(), ["a car"]))
    checks = tmp_path / "checks.jsonl"
    line = {"prompt": "a bench\u2028at night", "include": [{"class": "bench", "count": 1}]}
    checks.write_text(json.dumps(line, ensure_ascii=False) + "\r\n", "utf-8")
    options = DetectorOptions(checks=str(checks))
    assert DetectorReward.refuse_prompts(options, [line["prompt"]]) is None  # not two lines
    assert "no checks for the prompt 'an owl'" in str(DetectorReward.refuse_prompts(options, ["an owl"]))


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[" * 100_000])
def test_a_file_of_checks_that_is_none(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "checks.jsonl").write_bytes(data)
    with pytest.raises(UsageError, match=r"checks\.jsonl"):
        read_checks(str(tmp_path / "checks.jsonl"))


def test_weights_that_are_not_the_readers_are_refused_at_once() -> None:
    named = registry.load_class(registry.REWARDS, shipped.resolve("emoji64:reader.py") + ":Named")
    named.preflight(named.Options())
    for file in ("emoji64:style_probe.json", "emoji64:nowhere.safetensors", "emoji64:generator"):
        with pytest.raises(UsageError):
            named.preflight(named.Options(weights=file))


@pytest.mark.parametrize("shards", [5, [], {"weight_map": {"a": 5}}, {"weight_map": {"a": [1]}}, {"weight_map": []}])
def test_an_index_of_shards_that_names_none(shards: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(shards), "utf-8")
    assert damaged_weights(tmp_path) == "model.safetensors.index.json is damaged"
