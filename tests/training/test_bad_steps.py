"""Updates whose gradient is not finite are skipped on all ranks alike, counted, and end the run if they go on."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_t2i.errors import RunError, Stopped
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.assistant import AssistantRole
from rlhf_t2i.roles.trained import Update
from rlhf_t2i.tools import report
from rlhf_t2i.training import checkpoints, run
from rlhf_t2i.training.callbacks import TrainCallback
from tests.training.test_run import StopAt, metrics

MakeRecipe = Callable[..., Recipe]
# Not finite in the calls FIRST to LAST of the first process alone, so that ranks must agree to skip.
POISON = """
import os
from rlhf_t2i_plugins.divergences.l2 import L2

class Poison(L2):
    calls = 0

    def derivative(self, delta):
        Poison.calls += 1
        bad = FIRST <= Poison.calls <= LAST and os.environ.get("RLHF_T2I_PROCESS", "all/0") == "all/0"
        return super().derivative(delta) * (float("nan") if bad else 1.0)
"""


@pytest.fixture
def poisoned(tmp_path: Path, make_recipe: MakeRecipe) -> Callable[..., Recipe]:
    def build(first: int, last: int, **overrides: object) -> Recipe:
        plugin = tmp_path / "poison.py"
        plugin.write_text(POISON.replace("FIRST", str(first)).replace("LAST", str(last)), "utf-8")
        return make_recipe(
            algorithm__divergence=f"{{name: '{plugin}:Poison'}}",
            optimization__ema="{half_life_kimg: 0.01}",
            checkpoints="{every: 1, keep: 9}",
            **overrides,
        )

    return build


class Notes(TrainCallback):
    def __init__(self) -> None:
        self.heard = list[str]()

    def on_message(self, text: str) -> None:
        self.heard.append(text)


def test_one_bad_step_is_skipped_and_named(poisoned: Callable[..., Recipe], tmp_path: Path) -> None:
    out, notes = tmp_path / "out", Notes()
    run.run(poisoned(2, 2), out, callback=notes)
    assert [row["bad_steps"] for row in metrics(out)] == [0, 1, 1]
    assert [row["param_grad_norm/generator"] is None for row in metrics(out)] == [False, True, False]
    assert "NaN" not in (out / "metrics.jsonl").read_text("utf-8")
    assert [n for n in notes.heard if "the generator's gradient is not finite (prompt '" in n and "skipped" in n]
    assert [json.loads(line)["step"] for line in (out / "events.jsonl").read_text("utf-8").splitlines()] == [2]
    report.write_report(out)
    assert "Step 2: the generator&#39;s gradient is not finite" in (out / "report.html").read_text("utf-8")
    folders = [out / f"checkpoints/step_{step:06d}/learner" for step in (1, 2, 3)]
    states = [torch.load(folder / "local.pt", weights_only=True) for folder in folders]
    averages = [torch.load(folder / "average.pt", weights_only=True) for folder in folders]
    for name, before in states[0]["module"].items():
        assert torch.equal(before, states[1]["module"][name]), name
        assert torch.equal(averages[0][name], averages[1][name]), name
    assert all(
        torch.equal(states[0]["optimizer"]["state"][i][key], states[1]["optimizer"]["state"][i][key])
        for i in states[0]["optimizer"]["state"]
        for key in ("step", "exp_avg", "exp_avg_sq")
    )
    assert any(not torch.equal(states[1]["module"][n], states[2]["module"][n]) for n in states[1]["module"])


@pytest.mark.parametrize("assistant_steps", [0, 2])
def test_too_many_in_a_row_end_the_run(poisoned: Callable[..., Recipe], tmp_path: Path, assistant_steps: int) -> None:
    """Also with good updates of the assistant in between."""
    out = tmp_path / "out"
    with pytest.raises(
        RunError, match=r"step 3: the generator's gradient .* 2 of its updates in a row .*max_bad_steps: 1"
    ):
        run.run(poisoned(2, 99, optimization__max_bad_steps=1, algorithm__assistant_steps=assistant_steps), out)
    folder, progress, warnings = checkpoints.find(out)
    assert (folder.name, progress.bad_steps, progress.bad_in_a_row) == ("step_000002", 1, {"generator": 1})
    assert warnings == []


@pytest.mark.parametrize("stop", [(1, 1), (1, 0), (0, 1)])
def test_warnings_of_an_unfinished_cycle_are_kept_once(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: tuple[int, int]
) -> None:
    """A skipped update of the assistant, before a checkpoint in the middle of that cycle or after it."""
    train = AssistantRole.train

    @functools.wraps(train)
    def bad_in_the_first_round(role: AssistantRole, number: int, *args: Any) -> Update:
        update = train(role, number, *args)
        return replace(update, grad_norm=math.inf) if number % 2 == 0 else update

    monkeypatch.setattr(AssistantRole, "train", bad_in_the_first_round)
    recipe, out = make_recipe(steps=2, algorithm__assistant_steps=2), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        run.run(recipe, out, callback=StopAt(patch, *stop))
    run.run(recipe, out, resume=True)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text("utf-8").splitlines()]
    assert [event["step"] for event in events] == [1, 2]
    assert [row["bad_steps"] for row in metrics(out)] == [1, 2]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_all_ranks_skip_together(
    ray_instance: None, poisoned: Callable[..., Recipe], tmp_path: Path, zero: int
) -> None:
    out = tmp_path / "out"
    groups = "{all: {devices: 2, threads: 1, roles: [learner, generator, assistant, reference, reward]}}"
    run.run(poisoned(2, 2, optimization__zero_stage=zero, placement="{mode: ray, groups: " + groups + "}"), out)
    assert [row["bad_steps"] for row in metrics(out)] == [0, 1, 1]
    averages = [
        torch.load(out / f"checkpoints/step_{step:06d}/learner/average.pt", weights_only=True) for step in (1, 2, 3)
    ]
    assert all(torch.equal(value, averages[1][name]) for name, value in averages[0].items())
    assert all(value.isfinite().all() for value in averages[2].values())
    assert any(not torch.equal(value, averages[2][name]) for name, value in averages[1].items())
    assert json.loads((out / "evaluation/after/results.json").read_text("utf-8"))["step"] == 3
