"""A column of metrics.jsonl is what its name says, or it is not there."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.trained import Update
from rlhf_t2i.training import run
from rlhf_t2i.training.metrics import step_metrics
from rlhf_t2i.training.state import TrainState
from rlhf_t2i.utils import jsonl

MakeRecipe = Callable[..., Recipe]


def train(recipe: Recipe, out: Path) -> list[dict[str, Any]]:
    run.run(recipe, out)
    return jsonl.rows(out / "metrics.jsonl")


def test_what_a_run_does_not_do_has_no_column(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Without rewards nothing pulls, and without updates the assistant has no rate: a zero would be believed."""
    recipe = make_recipe(algorithm__rewards="[]", algorithm__assistant_steps=0, logging__watch_every=0)
    for row in train(recipe, tmp_path / "out"):
        absent = {"grad_norm/reward", "grad_cosine", "lr/assistant", "assistant_loss", "param_grad_norm/assistant"}
        assert not absent & row.keys()
        assert row["grad_norm/divergence"] > 0


def test_timing_of_a_step_leaves_out_what_is_drawn_between_steps(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Evaluation, watch, previews and checkpoints are no step's work; in one process no role works beside another."""
    recipe = make_recipe(logging="{samples_every: 1, sample_count: 4, watch_every: 1}", checkpoints__every=1)
    for row in train(recipe, tmp_path / "out"):
        timing = row["timing"]
        assert 0.5 * timing["step"] < sum(timing["busy"].values()) <= timing["step"] * 1.001


def test_samples_that_no_reward_pulls_have_no_angle(make_recipe: MakeRecipe) -> None:
    """``reward_steps: last`` leaves most samples of a four-step generator out: a mean over them would be a quarter."""
    samples = {"timestep": [1.0] * 4, "delta_norm": [1.0] * 4, "grad_cosine": [math.nan, 0.4, math.nan, 0.2]}
    recipe, state = make_recipe(), TrainState(step=1)
    metrics = step_metrics(recipe, state, [Update(1.0, samples=samples)], [], {"step": 1.0}, {})
    assert metrics["grad_cosine"] == pytest.approx(0.3)
    samples["grad_cosine"] = [math.nan] * 4
    assert "grad_cosine" not in step_metrics(recipe, state, [Update(1.0, samples=samples)], [], {"step": 1.0}, {})
