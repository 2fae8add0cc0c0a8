"""What ``run`` refuses before its roles start, ``plan`` refuses with the same sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_t2i.cli import app
from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning import plan
from rlhf_t2i.training import run

PLUGINS = """
from rlhf_t2i import plugins
from rlhf_t2i.errors import UsageError


class Mine(plugins.Reward):
    @classmethod
    def preflight(cls, options):
        raise UsageError("no such scorer")


class Apart(plugins.Divergence):
    def __init__(self, options=None):
        super().__init__(options)
        raise ValueError("no such distance")
"""


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm.rewards+={name: 'FILE:Mine', label: mine}", "no such scorer"),
        ("algorithm.divergence.name=FILE:Apart", r"cannot be built: mine\.py:15: ValueError: no such distance"),
        ("algorithm.timesteps.assistant=[1, 5000]", r"algorithm\.timesteps\.assistant"),
        ("student.timesteps=[1000]", r"student\.timesteps: 1000 is outside"),
        ("models.vae=FOLDER", "FOLDER"),
        (
            "optimization.generator.lora={rank: 2, targets: [to_x]}",
            r"^--set .*: optimization\.generator\.lora\.targets: the network has no layer 'to_x'",
        ),
        (
            "optimization.assistant.lora={rank: 2, targets: [conv_in]}",
            r"optimization\.assistant\.lora\.targets: 'conv_in' is a Conv2d: adapters go on linear layers",
        ),
    ],
)
def test_plan_and_run_refuse_alike(
    override: str, words: str, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    make_recipe()
    plugin, empty = tmp_path / "mine.py", tmp_path / "empty"
    plugin.write_text(PLUGINS, "utf-8")
    empty.mkdir()
    text = override.replace("FILE", str(plugin)).replace("FOLDER", str(empty))
    planned = CliRunner().invoke(app, ["plan", str(tmp_path / "recipe.yaml"), "--set", text])
    with pytest.raises(UsageError, match=words.replace("FOLDER", str(empty))) as refused:
        run.run(reading.load(tmp_path / "recipe.yaml", [text]), tmp_path / "out")
    assert str(planned.exception) == str(refused.value)
    assert "counting the networks" not in planned.stderr


def test_prompts_that_a_run_refuses_are_refused_after_the_plan(
    make_recipe: Callable[..., Recipe], tiny_prompts: Path, tmp_path: Path
) -> None:
    make_recipe()
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / "recipe.yaml"), "--set", f"data.held_out={tiny_prompts}"])
    assert "Memory" in shown.output or "device" in shown.output
    assert isinstance(shown.exception, UsageError)
    assert "of its prompts are in data.prompts, too" in str(shown.exception)


def test_a_footprint_that_does_not_run_is_one_sentence(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    plugin = tmp_path / "shape.py"
    plugin.write_text(
        "from torch import nn\nfrom rlhf_t2i import plugins\n\n\n"
        "class Shape(plugins.Reward):\n"
        "    @classmethod\n    def footprint(cls, options):\n"
        "        return plugins.Footprint('mine', lambda: nn.Conv2d(4, 1, 1))\n",
        "utf-8",
    )
    recipe = make_recipe(algorithm__rewards=f"[{{name: '{plugin}:Shape', label: mine}}]")
    with pytest.raises(UsageError, match=r"^reward 'mine': its footprint cannot be measured: RuntimeError: .*channel"):
        plan.make(recipe)
