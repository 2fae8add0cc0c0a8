"""``--set``, paths, and how fast a refusal comes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Recipe
from tests.recipe.base import BASE


def test_set_overrides_any_key(recipe: Path) -> None:
    loaded = reading.load(
        recipe,
        [
            "steps=3",
            "algorithm.cfg.guidance_scale=1.5",
            "algorithm.rewards.0.scale=1e1",
            "algorithm.divergence={name: kl}",
            "optimization.generator.betas=[0.5, 0.9]",
            "optimization.ema=null",
            "placement=local",
            "models.vae=org/other",
            "placement.mode=local",
        ],
    )
    assert loaded.steps == 3
    assert loaded.algorithm.cfg.guidance_scale == 1.5
    assert loaded.algorithm.rewards[0].scale == 10
    assert loaded.algorithm.divergence.name == "kl"
    assert loaded.optimization.generator.betas == [0.5, 0.9]
    assert loaded.optimization.ema is None
    assert loaded.placement.mode == "local"
    assert loaded.models.vae == "org/other"


def test_the_last_set_wins(recipe: Path) -> None:
    assert reading.load(recipe, ["steps=3", "steps=4"]).steps == 4


def test_paths_are_relative_to_the_recipe_or_to_the_shell(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    loaded = reading.load(recipe, ["data.held_out=./mine.txt"])
    assert loaded.data.prompts == str(tmp_path / "prompts.txt")
    assert loaded.data.held_out == str(elsewhere / "mine.txt")
    assert loaded.algorithm.rewards[0].options["model"] == str(tmp_path / "pickscore")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", ["--set steps", "key.subkey=value"]),
        ("=3", ["key.subkey=value"]),
        ("a..b=3", ["key.subkey=value"]),
        ("stepz=3", ["--set stepz=3", "did you mean 'steps'"]),
        ("models.referense=./x", ["--set models.referense=./x", "did you mean 'reference'"]),
        ("steps=many", ["--set steps=many", "steps"]),
        ("steps=[", ["--set steps=[", "YAML"]),
        ("steps.a=1", ["steps"]),
        ("algorithm.rewards.7.scale=1", ["7", "1 entries"]),
        ("algorithm.rewards.x=1", ["x", "entries"]),
        ("steps=" + "9" * 5000, ["--set"]),
        ("steps=!!python/name:os.system", ["YAML"]),
        ("algorithm=&a {b: *a}", ["--set"]),
        ("algorithm.divergence.options=&a [*a]", ["--set"]),
        ("seed=2020-99-99", ["--set"]),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_bad_overrides(override: str, words: list[str], recipe: Path) -> None:
    with pytest.raises(UsageError) as caught:
        reading.load(recipe, [override])
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_dump_is_read_back(recipe: Path) -> None:
    loaded = reading.load(recipe)
    recipe.write_text(reading.dump(loaded))
    assert reading.load(recipe) == loaded


def test_a_students_timesteps_count_its_steps(recipe: Path) -> None:
    """Also in a recipe that is written down and read again, where every key is set."""
    for override, steps in (("student.timesteps=[999, 499]", 2), ("student={steps: 4}", 4)):
        loaded = reading.load(recipe, [override])
        assert loaded.student.steps == steps
        assert Recipe.model_validate(loaded.model_dump()) == loaded
    with pytest.raises(UsageError, match="steps is 3 but timesteps has 2: leave steps out"):
        reading.load(recipe, ["student={steps: 3, timesteps: [999, 499]}"])


def test_a_refusal_is_quick_and_imports_no_torch(recipe: Path) -> None:
    """Under half a second, counted in processor time: wall time on a shared machine says little."""
    recipe.write_text(BASE.replace("\nsteps:", "\nstepz:"))
    code = (
        "import sys\n"
        "from rlhf_t2i import errors\n"
        "from rlhf_t2i.recipe import placement, reading\n"
        "try: placement.check_placement(reading.load(sys.argv[1]))\n"
        "except errors.UsageError as e: print(e)\n"
        "print(sorted({'torch', 'ray', 'diffusers', 'transformers', 'deepspeed'} & set(sys.modules)))\n"
    )
    seconds = []
    for _ in range(3):
        began = os.times()
        ran = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True, check=True)
        ended = os.times()
        seconds.append(ended.children_user + ended.children_system - began.children_user - began.children_system)
        sentence, modules = ran.stdout.splitlines()
        assert "did you mean 'steps'" in sentence
        assert modules == "[]"
    assert min(seconds) < 0.5


def test_an_ablation_is_sent_to_its_own_command() -> None:
    with pytest.raises(UsageError, match=r"ablation_table2.yaml is an ablation .* `rlhf-t2i ablate`"):
        reading.load(Path(__file__).parents[2] / "recipes/ablation_table2.yaml")
