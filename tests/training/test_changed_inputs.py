"""A resumed run compares everything that its result depends on with what it began with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import run
from rlhf_t2i.training.folder import RunFolder
from rlhf_t2i.utils import versions
from tests.training.test_run import metrics

MakeRecipe = Callable[..., Recipe]


def test_a_changed_recipe_is_refused_unless_allowed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run.run(make_recipe(steps=1), out)
    started = (out / "recipe.yaml").read_bytes()
    changed = {"steps": 2, "algorithm__cfg__guidance_scale": 5.0, "data__prompts": make_recipe().data.prompts}
    with pytest.raises(UsageError, match=r"algorithm.cfg.guidance_scale \(3.0 -> 5.0\); .*--allow-recipe-change"):
        run.run(make_recipe(**changed), out, resume=True)
    other = make_recipe(**changed, optimization__generator__lora="{rank: 2}")  # another net: nothing to restore it from
    with pytest.raises(RunError, match="other weights"):
        run.run(other, out, resume=True, allow_recipe_change=True)
    assert (out / "recipe.yaml").read_bytes() == started
    assert not (out / "recipe_changes.jsonl").exists()

    run.run(make_recipe(**changed), out, resume=True, allow_recipe_change=True)
    assert [row["step"] for row in metrics(out)] == [1, 2]
    assert reading.load(out / "recipe.yaml") == make_recipe(**changed)
    change = json.loads((out / "recipe_changes.jsonl").read_text("utf-8"))
    assert change == {"step": 1, "changed": ["steps (1 -> 2)", "algorithm.cfg.guidance_scale (3.0 -> 5.0)"]}


def test_an_edited_prompt_file_is_a_change_of_the_recipe(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """One prompt more, and every draw to come is another."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red cat\na blue dog\n", "utf-8")
    changed = {"data__prompts": str(prompts), "data__held_out": make_recipe().data.prompts}
    run.run(make_recipe(steps=1, **changed), out)
    prompts.write_text("a red cat\na blue dog\na green owl\n", "utf-8")
    with pytest.raises(UsageError, match=r"since the run began: data\.prompts \(content\); .*--allow-recipe"):
        run.run(make_recipe(steps=2, **changed), out, resume=True)
    assert [row["step"] for row in metrics(out)] == [1]
    run.run(make_recipe(steps=2, **changed), out, resume=True, allow_recipe_change=True)
    change = json.loads((out / "recipe_changes.jsonl").read_text("utf-8"))
    assert change == {"step": 1, "changed": ["steps (1 -> 2)", "data.prompts (content)"]}
    run.run(make_recipe(steps=3, **changed), out, resume=True)  # accepted once, it is the run's own


REWARD = """
from helper import LEVEL
from rlhf_t2i.plugins import Options, Reward

class Mean(Reward):
    class Options(Options):
        table: str

    differentiable = True

    def score(self, images, prompts):
        return images.flatten(1).mean(1) * LEVEL
"""


def test_everything_that_the_result_depends_on_is_compared(
    make_recipe: MakeRecipe, tmp_path: Path, tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code of a reward and of what it imports beside it, files that its options name, weights of every model."""
    monkeypatch.syspath_prepend(str(tmp_path))
    plugin, helper, table = tmp_path / "mean.py", tmp_path / "helper.py", tmp_path / "table.bin"
    reference, out = tmp_path / "reference", tmp_path / "out"
    shutil.copytree(tiny_sdxl, reference)
    shutil.copytree(reference / "unet", tmp_path / "generator")
    plugin.write_text(REWARD, "utf-8")
    helper.write_text("LEVEL = 1.0\n", "utf-8")
    table.write_bytes(b"weights")
    recipe = make_recipe(
        steps=1,
        models=f"{{reference: {reference}, generator: {tmp_path / 'generator'}, height: 16, width: 16}}",
        algorithm__rewards=f"[{{name: '{plugin}:Mean', label: mean, options: {{table: {table}}}}}]",
    )
    folder = RunFolder(out)
    folder.create(recipe)
    assert folder.compare_recipe(recipe) == []
    for file, key in (
        (plugin, "algorithm.rewards: mean"),
        (helper, "algorithm.rewards: mean"),
        (table, "algorithm.rewards: mean"),
        (reference / "vae/diffusion_pytorch_model.safetensors", "models.reference"),
        (tmp_path / "generator/diffusion_pytorch_model.safetensors", "models.generator"),
    ):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UsageError, match=rf"since the run began: {key} \(content\); .*--allow-recipe"):
            folder.compare_recipe(recipe)
        file.write_bytes(whole)
    monkeypatch.setattr(versions, "computing", lambda: {"torch": "99.0"})
    (difference,) = [text for text in folder.compare_recipe(recipe) if "versions.torch" in text]  # told, not refused
    assert difference.endswith("-> 99.0)")
    folder.inputs.write_text("{", "utf-8")
    with pytest.raises(UsageError, match=r"inputs\.json \(missing or damaged\)"):
        folder.compare_recipe(recipe)
