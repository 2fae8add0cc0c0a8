"""The public API: lazy, typed, and the same words for the same mistakes as the commands."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import rlhf_t2i
from rlhf_t2i import api
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools import progress, train
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.run import RunResult
from rlhf_t2i.training.state import TrainState
from tests import tiny

REWARD = """
from rlhf_t2i.plugins import Reward

class Brightness(Reward):
    uses_prompt = False
    def score(self, images, prompts):
        return images.flatten(1).mean(1)

class Broken(Reward):
    def score(self, images, prompts):
        return images.flatten(1).mean(1) / 0
"""


@pytest.fixture
def brightness(tmp_path: Path) -> rlhf_t2i.Scorer:
    (tmp_path / "my.py").write_text(REWARD)
    return rlhf_t2i.reward(f"{tmp_path}/my.py:Brightness", device="cpu")


def gray(level: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def test_importing_the_package_and_refusing_a_recipe_need_no_torch(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("stepps: 3\n")
    program = """
import sys, rlhf_t2i
assert "train" in dir(rlhf_t2i)
try:
    rlhf_t2i.train("recipe.yaml")
except rlhf_t2i.UsageError as error:
    print(error)
assert not {"torch", "ray", "diffusers", "transformers", "PIL"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "line 1" in done.stdout
    assert "did you mean 'steps'" in done.stdout


def test_names_for_type_checkers_are_the_names_that_load() -> None:
    tree = ast.parse(Path(rlhf_t2i.__file__).read_text("utf-8"))
    typed = {
        (node.module, alias.name)
        for block in tree.body
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {(module, name) for module, names in rlhf_t2i._MODULES.items() for name in names}
    assert sorted(name for _, name in typed) == sorted(rlhf_t2i.__all__)
    assert all(getattr(rlhf_t2i, name).__doc__ for name in rlhf_t2i.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        rlhf_t2i.trian  # noqa: B018


def test_a_recipe_may_be_a_file_a_dictionary_or_read_already(
    make_recipe: Callable[..., Recipe], tmp_path: Path, tiny_sdxl: Path, tiny_prompts: Path
) -> None:
    made = make_recipe()
    changes = {"steps": 7, "optimization__batch_size": 8, "algorithm__rewards__0__scale": 5.0}
    for source in (tmp_path / "recipe.yaml", str(tmp_path / "recipe.yaml"), made, made.model_dump()):
        recipe = api.read_recipe(source, {"seed": 11}, changes)
        assert (recipe.seed, recipe.steps, recipe.optimization.batch_size) == (11, 7, 8)
        assert recipe.algorithm.rewards[0].scale == 5
        assert recipe.models == made.models
    recipe = api.read_recipe(tiny.recipe_dict(tiny_sdxl, tiny_prompts, data={"prompts": tiny_prompts}))
    assert recipe.data.prompts == str(tiny_prompts)


def test_a_dictionary_with_a_mistake_is_refused_in_a_sentence() -> None:
    with pytest.raises(rlhf_t2i.UsageError, match="unknown key 'stepps'; did you mean 'steps'"):
        rlhf_t2i.plan({"stepps": 3, "models": {"reference": "a", "generator": "a"}, "data": {"prompts": "p.txt"}})
    with pytest.raises(rlhf_t2i.UsageError, match=r"out=\.\.\."):
        rlhf_t2i.train({"steps": 3, "models": {"reference": "a", "generator": "a"}, "data": {"prompts": "p.txt"}})


@pytest.mark.parametrize(("recipe", "overrides"), [(None, None), (5, None), ([{}], None), ({}, ["a=b"])])
def test_arguments_of_another_type_are_refused_in_a_sentence(recipe: object, overrides: object) -> None:
    with pytest.raises(rlhf_t2i.UsageError, match=r"^(a recipe is|overrides are) a .*, not "):
        rlhf_t2i.plan(recipe, overrides)  # type: ignore[arg-type]


def test_a_run_is_not_overwritten(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/recipe.yaml").write_text("")
    with pytest.raises(
        rlhf_t2i.UsageError, match="already holds a run: continue it with resume=True, or choose another o"
    ):
        rlhf_t2i.train(make_recipe(), tmp_path / "out")


@pytest.mark.parametrize(
    "arguments", [{}, {"progress": False}, {"callback": TrainCallback()}], ids=["plain", "progress", "callback"]
)
def test_the_progress_of_training_is_printed_unless_someone_else_takes_it(
    arguments: dict[str, Any],
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(recipe: Recipe, out: Path, *, callback: TrainCallback, **_: object) -> RunResult:
        callback.on_phase("starting the roles")
        callback.on_step(TrainState(step=1), {"step": 1, "reward/pick": 0.25, "timing": {"step": 2.0}})
        callback.on_message("a warning")
        return RunResult(out, TrainState())

    monkeypatch.setattr(train, "train", run)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1)
    rlhf_t2i.train(make_recipe(), tmp_path / "out", **arguments)
    printed = capsys.readouterr()
    assert printed.out == ""
    texts = [line.partition("] ")[2] for line in printed.err.splitlines()]
    lines = ["starting the roles", "step 1/3, pick 0.2500, 2.00 s/step, 4 s left", "a warning"]
    assert texts == ([] if arguments else lines)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("shown", [True, False])
def test_phases_are_bars_in_a_terminal_and_lines_elsewhere(
    shown: bool, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1)
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    with progress.phases(shown) as show:
        show("drawing", 1, 3)
    printed = capsys.readouterr().err
    if not shown:
        assert printed == ""
    elif terminal:
        assert "1/3" in printed
    else:
        assert printed == "drawing, 1 of 3\n"


def test_training_from_python(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    result = rlhf_t2i.train(make_recipe(), tmp_path / "out", steps=1)
    assert [row.kind for row in result.table] == ["train", "diversity"]
    assert result.report.is_file()
    assert len(result.metrics.read_text().splitlines()) == 1
    first, second = result.load().sample(["a red cat", "a blue dog"], seed=4)
    assert first.size == (tiny.RESOLUTION, tiny.RESOLUTION)
    (again,) = rlhf_t2i.load(result.out).sample(["a blue dog"], seed=5)
    assert again.tobytes() == second.tobytes()
    assert first.tobytes() != second.tobytes()


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (gray(255), [1.0]),
        ([gray(0), gray(51)], [0.0, 0.2]),
        ([gray(0), gray(51, (16, 4))], [0.0, 0.2]),
        ([Image.new("RGBA", (8, 8), (0, 0, 0, 0))], [1.0]),
        (torch.full((2, 3, 8, 8), 0.25), [0.25, 0.25]),
    ],
    ids=["one image", "a list", "two sizes", "transparent pixels show white", "a tensor"],
)
def test_a_reward_scores_images(
    brightness: rlhf_t2i.Scorer, images: Image.Image | list[Image.Image] | Tensor, expected: list[float]
) -> None:
    scores = brightness.score(images, "a cat")
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)
    assert not scores.requires_grad


def test_gradients_flow_through_a_reward(brightness: rlhf_t2i.Scorer) -> None:
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    brightness.score(images, ["a", "b"]).sum().backward()
    assert images.grad is not None
    assert torch.allclose(images.grad, torch.full_like(images, 1 / 48))


@pytest.mark.parametrize(
    ("images", "prompts", "words"),
    [
        ([gray(0)], ["a", "b"], "1 images but 2 prompts"),
        (torch.zeros(3, 8, 8), "a", "[B, 3, H, W]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "a", "torch.uint8"),
        (["a.png"], "a", "PIL image"),
        (None, "a", "PIL image"),
        ([], "a", "no images"),
        (torch.full((1, 3, 8, 8), 200.0), "a", "outside [0, 1]"),
    ],
)
def test_wrong_images_are_refused(brightness: rlhf_t2i.Scorer, images: object, prompts: object, words: str) -> None:
    with pytest.raises(rlhf_t2i.UsageError) as caught:
        brightness.score(images, prompts)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_a_failing_reward_is_a_sentence(brightness: rlhf_t2i.Scorer, tmp_path: Path) -> None:
    with pytest.raises(rlhf_t2i.RunError, match="not finite"):
        rlhf_t2i.reward(f"{tmp_path}/my.py:Broken", device="cpu").score(gray(3), "a cat")
    with pytest.raises(rlhf_t2i.UsageError, match="scores latents"):
        rlhf_t2i.reward("cfg_implicit")
    with pytest.raises(rlhf_t2i.UsageError, match="did you mean 'pickscore'"):
        rlhf_t2i.reward("pikscore")


def test_an_evaluation_takes_a_list_of_prompts(
    make_recipe: Callable[..., Recipe], brightness: rlhf_t2i.Scorer, tmp_path: Path, tiny_sdxl: Path
) -> None:
    name = f"{tmp_path}/my.py:Brightness"
    steps: list[tuple[str, int, int]] = []
    found = rlhf_t2i.evaluate(
        tiny_sdxl, ["a red cat", "a blue dog"], metrics=[f"light={name}"], out=tmp_path / "eval",
        steps=2, height=tiny.RESOLUTION, width=tiny.RESOLUTION, progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert found.prompts == ["a red cat", "a blue dog"]
    assert len(found.metrics["light"].by_prompt) == 2
    assert steps[-1] == ("scoring light", 2, 2)
    with pytest.raises(rlhf_t2i.UsageError, match="unknown argument 'seeed'; did you mean 'seed'"):
        rlhf_t2i.evaluate(tiny_sdxl, ["a red cat"], metrics=[name], out=tmp_path / "other", seeed=1)


def test_a_plan_needs_no_run(make_recipe: Callable[..., Recipe]) -> None:
    small, large = (rlhf_t2i.plan(make_recipe(), optimization__batch_size=size) for size in (4, 16))
    assert small.batch["learner"]["global"] == 4
    assert large.groups[0].memory.device > small.groups[0].memory.device
