"""What a run is given: prompts that it calls unseen, and a recipe that changed since the run began. No training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import checkpoints, run_prompts
from rlhf_t2i.training.folder import RunFolder
from rlhf_t2i.training.run_prompts import RunPrompts

MakeRecipe = Callable[..., Recipe]


def surrogate(clip: Path, **options: object) -> str:
    chosen = {"of": {"name": "pickscore", "options": {"model": str(clip)}}, "features": str(clip), **options}
    return json.dumps([{"name": "surrogate", "options": chosen}])


def test_held_out_prompts_that_are_trained_on_are_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Tables and model cards would call them prompts that no step trained on."""
    (tmp_path / "train.txt").write_text("a cat\na dog\n a fox\n", "utf-8")
    (tmp_path / "other.csv").write_text('prompt\n"a fox"\na cow\n', "utf-8")
    recipe = make_recipe(data__prompts=str(tmp_path / "train.txt"), data__held_out=str(tmp_path / "other.csv"))
    with pytest.raises(UsageError, match=r"^data\.held_out: 1 of its prompts are in data\.prompts, too .*'a fox'"):
        RunPrompts.read(recipe)
    (tmp_path / "other.csv").write_text("prompt\na cow\n", "utf-8")
    assert list(RunPrompts.read(recipe).held_out) == ["a cow"]


def test_a_plan_checks_prompts_without_storing_those_to_train_on(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be tens of millions."""
    (tmp_path / "train.txt").write_text("a cat\na dog\n", "utf-8")
    (tmp_path / "other.txt").write_text("a dog\n", "utf-8")
    recipe = make_recipe(data__prompts=str(tmp_path / "train.txt"), data__held_out=str(tmp_path / "other.txt"))
    monkeypatch.setattr(run_prompts, "StoredPrompts", lambda _: pytest.fail("stores the prompts"))
    with pytest.raises(UsageError, match=r"^data\.held_out: 1 of its prompts"):
        run_prompts.check(recipe)
    (tmp_path / "other.txt").write_text("a cow\n", "utf-8")
    run_prompts.check(recipe)
    (tmp_path / "train.txt").write_text("\n", "utf-8")
    with pytest.raises(UsageError, match="holds no prompts"):
        run_prompts.check(recipe)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 32}, r"algorithm\.rewards\.0\.options\.width \(None -> 32\)"),
        ({"features": "org/clip"}, r"algorithm\.rewards\.0\.options\.features \(\S*tiny_clip\S* -> org/clip\)"),
    ],
)
def test_a_changed_surrogate_is_named_by_its_option(
    changes: dict[str, object], words: str, make_recipe: MakeRecipe, tiny_clip: Path, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "out")
    folder.create(make_recipe(algorithm__rewards=surrogate(tiny_clip)))
    with pytest.raises(UsageError, match=words) as caught:
        folder.compare_recipe(make_recipe(algorithm__rewards=surrogate(tiny_clip, **changes)), allow_change=False)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("text", ["{", "{}", '{"content": 5, "versions": {}}', '{"x": 1}', "[]"])
def test_a_damaged_record_of_inputs_is_a_change(text: str, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder, recipe = RunFolder(tmp_path / "out"), make_recipe()
    folder.create(recipe)
    folder.inputs.write_text(text, "utf-8")
    with pytest.raises(UsageError, match=r"inputs\.json \(missing or damaged\)"):
        folder.compare_recipe(recipe, allow_change=False)


def test_a_lone_damaged_checkpoint_promises_no_older_one(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints/step_000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"step": 1}', "utf-8")
    with pytest.raises(UsageError, match="holds no whole checkpoint; checkpoint step_000001 is damaged") as caught:
        checkpoints.find(tmp_path)
    assert "older" not in str(caught.value)
