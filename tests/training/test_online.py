"""Rewards that learn while the generator trains: their lessons, checkpoints, resumes, and where they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_t2i.errors import RunError, Stopped, UsageError
from rlhf_t2i.evaluation.held_out import Samples
from rlhf_t2i.plugins import traits
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import run
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.folder import RunFolder
from rlhf_t2i.training.hacking import HackingMonitor
from tests.training import online_reward
from tests.training.test_run import StopAt, metrics, model_bytes

MakeRecipe = Callable[..., Recipe]
PLUGIN = f"{online_reward.__file__}:Learns"
SMALL: dict[str, Any] = {
    "evaluation": "{images: 4, images_per_prompt: 2, batch_size: 4}",
    "logging": "{samples_every: 9, sample_count: 2, watch_every: 2, watch_images: 4}",
}


def learns(make_recipe: MakeRecipe, *options: str, **overrides: Any) -> Recipe:
    rewards = f"[{{name: '{PLUGIN}', label: learned, scale: 10, options: {{{', '.join(options)}}}}}]"
    return make_recipe(algorithm__rewards=rewards, **(SMALL | overrides))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of undisturbed runs, by the test's own recipe."""
    return tmp_path_factory.mktemp("whole") / "out"


def test_lessons_precede_every_step_and_the_table_shows_the_scorer(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    measured: list[tuple[int, int, set[str]]] = []

    class Measurements(TrainCallback):
        def on_measurement(self, step: int, samples: Samples) -> None:
            measured.append((step, len(samples.prompts), set(samples.scores)))

    calls, out = tmp_path / "calls.txt", tmp_path / "out"
    run.run(learns(make_recipe, f"calls: {calls}"), out, callback=Measurements())
    assert measured == [(0, 4, {"learned"}), (2, 4, {"learned", "learned (predicted)"})]
    rows = metrics(out)
    assert [row["online/learned/seen"] for row in rows] == [12, 16, 20]  # a warm-up of 2, then one per step, of 4
    assert all(row["grad_norm/reward/learned"] > 0 for row in rows)
    sizes = [int(line.split()[0]) for line in calls.read_text("utf-8").splitlines()]
    assert sizes == [4] * len(sizes)
    assert len(sizes) == 3 + 2 + 3 - 1 + 1  # before, after and one watch; two of warm-up, and three
    after = json.loads((out / "evaluation/after/results.json").read_text("utf-8"))
    assert all(round(value, 3) == pytest.approx(value, abs=1e-6) for value in after["metrics"]["learned"]["by_image"])
    watched = [json.loads(line) for line in (out / "evaluation/watch.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in watched] == [2]  # before the first lesson nothing is predicted
    assert set(watched[0]["signals"]) == {"true learned", "diversity"}
    assert watched[0]["reward"] != [10 * value for value in watched[0]["signals"]["true learned"]]
    events = [json.loads(line) for line in (out / "events.jsonl").read_text("utf-8").splitlines()]
    assert [(event["step"], event["text"]) for event in events] == [(1, "reward 'learned': the first lesson")]
    best = json.loads((out / "checkpoints/step_000003/manifest.json").read_text("utf-8"))
    assert best["reward"] == pytest.approx(10 * sum(row["online/learned/true"] for row in rows[-2:]) / 2)


@pytest.mark.parametrize("stop", [(0, 0), (1, 1)])
def test_resume_is_bit_identical(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, stop: tuple[int, int]
) -> None:
    """(0, 0) is within the warm-up, after the reward's first lesson; (1, 1) after a lesson and an assistant's round."""
    recipe = learns(make_recipe, algorithm__assistant_steps=2, steps=2, checkpoints__every=9)
    if not whole.exists():
        run.run(recipe, whole)
    with monkeypatch.context() as patch:
        if stop == (0, 0):  # not while the evaluation before training runs
            patch.setattr("rlhf_t2i.training.evaluator.Evaluator.evaluate", lambda *args: None)
        stopper = StopAt(patch, *stop)
        with pytest.raises(Stopped):
            run.run(recipe, tmp_path / "out", callback=stopper)
    run.run(recipe, tmp_path / "out", resume=True)
    assert model_bytes(tmp_path / "out") == model_bytes(whole)
    assert metrics(tmp_path / "out") == metrics(whole)
    states = [torch.load(out / "checkpoints/step_000002/reward/learned.pt") for out in (tmp_path / "out", whole)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in ("features", "values", "weight"))
    assert len(states[0]["values"]) == 16
    events = [(folder / "events.jsonl").read_text("utf-8") for folder in (tmp_path / "out", whole)]
    assert events[0] == events[1]


def test_a_checkpoint_without_the_rewards_state_is_named(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run.run(make_recipe(steps=1, **SMALL), tmp_path / "out")
    recipe = learns(make_recipe, steps=2)
    with pytest.raises(UsageError, match="step_000001 holds no state of the reward 'learned'"):
        run.run(recipe, tmp_path / "out", resume=True, allow_recipe_change=True)


def test_a_lesson_that_fails_names_reward_prompt_and_sample(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"reward 'learned' failed on the prompt .*ValueError: no lesson today"):
        run.run(learns(make_recipe, "fail_at: 1"), out)
    assert list(RunFolder(out).failures.rglob("image.png"))


def test_a_lesson_that_hangs_ends_at_the_rewards_limit(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rewards = f"[{{name: '{PLUGIN}', label: learned, timeout_s: 5, options: {{hang_at: 0}}}}]"
    sentence = r"reward 'learned' did not return within 5 s \(timeout_s of learned\); it was at online_reward.py:"
    with pytest.raises(RunError, match=sentence):
        run.run(make_recipe(algorithm__rewards=rewards, **SMALL), tmp_path / "out")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"algorithm__eval_rewards": f"[{{name: '{PLUGIN}'}}]"}, "put the scorer itself into eval_rewards"),
        (
            {"algorithm__rewards": f"[{{name: '{PLUGIN.replace(':Learns', ':Watching')}'}}]"},
            r"cannot have an environment of its own",
        ),
        (
            {
                "algorithm__rewards": f"[{{name: '{PLUGIN}', label: learned}}]",
                "placement": "{groups: {train: {roles: [learner, assistant]}, "
                "serve: {devices: 2, roles: [reference, reward]}}}",
            },
            r"placement.groups.serve.devices: 2, but reward 'learned' learns and needs a group of one device",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    make_recipe: MakeRecipe, tmp_path: Path, overrides: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        run.run(make_recipe(**overrides), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prediction_that_rises_while_its_scorer_falls_is_hacking(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    monitor = HackingMonitor(tmp_path / "watch.jsonl", learns(make_recipe))
    prompts, draw = [f"prompt {i}" for i in range(8) for _ in range(2)], np.random.default_rng(0)

    def scores(mean: float) -> list[float]:
        return (mean + 0.01 * draw.normal(size=16)).tolist()

    told = []
    for step in range(1, 6):
        latents = torch.randn(16, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        found = {"learned": scores(-0.1 * step), "learned (predicted)": scores(0.1 * step)}
        told += monitor.update(step, Samples(prompts, latents, found))[1]
    (text,) = told
    assert "true learned, which no step trains on, fell" in text
    assert monitor.update(6, Samples(prompts, latents, {"learned": scores(0)})) == ({}, [])  # it predicts nothing yet


def test_traits_of_a_reward_that_learns(make_recipe: MakeRecipe) -> None:
    schedule = traits.resolve(learns(make_recipe)).online["learned"]
    assert (schedule.images, schedule.lessons(0), schedule.lessons(5)) == (4, 3, 8)
    assert traits.resolve(make_recipe()).online == {}


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_reward_that_learns_returns_to_the_checkpoint_bit_for_bit(
    ray_instance: None, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray must not restart it in place: it would go on with what it knew at the start."""
    from tests.training.test_restore import Killer

    groups = (
        "{train: {roles: [learner, generator, assistant, reference], threads: 1}, score: {roles: [reward], threads: 1}}"
    )
    recipe = learns(make_recipe, placement="{mode: ray, groups: " + groups + "}", steps=4, checkpoints__every=2)
    run.run(recipe, tmp_path / "whole")
    killer = Killer(monkeypatch, tmp_path / "killed", 2, {1: "score", 3: "score"})
    run.run(recipe, tmp_path / "killed", callback=killer)
    assert model_bytes(tmp_path / "killed") == model_bytes(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    restarts = [note for note in killer.notes if "restart" in note]
    assert ["the beginning" in restarts[0], "step_000002" in restarts[1], len(restarts)] == [True, True, 2]
