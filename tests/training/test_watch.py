"""Watching for reward hacking and for bf16 drift: what must warn, and what must not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_t2i.engines.deepspeed import DeepSpeedEngine
from rlhf_t2i.recipe.schema import Optimization, Recipe
from rlhf_t2i.tools import report
from rlhf_t2i.training import run
from rlhf_t2i.training.bf16 import Bf16Monitor
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.hacking import HackingDetector, Measurement
from tests.training.ranks import run_ranks

MakeRecipe = Callable[..., Recipe]
PROMPTS = 16


def warnings(
    measurements: int, judge: Callable[[int], float], spread: Callable[[int], float], climb: float = 0.1, seed: int = 0
) -> list[tuple[int, str]]:
    """What a run warns of whose prompts differ by 1, with noise of 0.05 a prompt on top of the given means."""
    draw = np.random.default_rng(seed)
    prompts, detector, found = draw.normal(0, 1, PROMPTS), HackingDetector(), []
    for number in range(measurements):
        noise = draw.normal(0, 0.05, (3, PROMPTS))
        signals = {"judge": prompts + judge(number) + noise[0], "diversity": np.exp(noise[1]) * spread(number)}
        reward = prompts + climb * number + noise[2]
        now = Measurement(number, reward.tolist(), {name: values.tolist() for name, values in signals.items()})
        found += [(number, text) for text in detector.update(now)]
    return found


def test_a_falling_unseen_scorer_warns_once_an_occurrence() -> None:
    found = warnings(30, lambda n: -0.05 * max(n - 9, 0) if n < 20 else 0.0, lambda n: 1.0)
    ((step, text),) = found
    assert 11 <= step <= 14
    assert "judge, which no step trains on, fell by" in text
    assert "the trained reward rose by" in text
    assert "standard errors over 16 prompts" in text
    again = warnings(40, lambda n: -0.4 if n in (10, 11, 12, 13, 30, 31, 32) else 0.0, lambda n: 1.0)
    assert [step for step, _ in again] == [11, 31]


def test_a_signal_of_which_lower_is_better_warns_when_it_rises() -> None:
    draw, detector, found = np.random.default_rng(0), HackingDetector(["defects"]), []
    prompts = draw.normal(0, 1, PROMPTS)
    for number in range(30):
        noise = draw.normal(0, 0.05, (2, PROMPTS))
        signals = {"defects": (prompts + 0.05 * max(number - 9, 0) + noise[0]).tolist()}
        now = Measurement(number, (prompts + 0.1 * number + noise[1]).tolist(), signals)
        found += detector.update(now)
        assert now.metrics()["watch/defects"] == pytest.approx(np.mean(signals["defects"]))  # not its negative
    (text,) = found
    assert "defects, which no step trains on, rose by" in text


def test_collapsing_diversity_warns_and_a_little_less_does_not() -> None:
    ((_, text),) = warnings(20, lambda n: 0.0, lambda n: 0.9**n)
    assert "diversity within a prompt fell to" in text
    assert warnings(20, lambda n: 0.0, lambda n: max(0.85, 1 - 0.02 * n)) == []


def test_without_a_climbing_reward_nothing_is_hacked() -> None:
    assert warnings(20, lambda n: -0.1 * n, lambda n: 0.9**n, climb=-0.1) == []


def test_one_low_measurement_is_not_enough() -> None:
    assert warnings(20, lambda n: -1.0 if n == 10 else 0.0, lambda n: 1.0) == []


def test_noise_does_not_warn() -> None:
    runs = [warnings(40, lambda n: 0.0, lambda n: 1.0, seed=seed) for seed in range(25)]
    assert sum(bool(run) for run in runs) <= 1


def test_values_that_are_no_numbers_say_nothing() -> None:
    assert warnings(10, lambda n: float("nan"), lambda n: 1.0) == []
    (_, text), *others = warnings(10, lambda n: float("nan") if n == 0 else -0.2 * n, lambda n: 1.0)
    assert "judge" in text
    assert not others


JUDGE = """
from rlhf_t2i.plugins import Reward

class Rising(Reward):
    differentiable = True
    calls = 0

    def score(self, images, prompts):
        Rising.calls += 1
        return images.flatten(1).mean(1) * 1e-3 + 0.1 * Rising.calls

class Falling(Reward):
    calls = 0

    def score(self, images, prompts):
        Falling.calls += 1
        return images.flatten(1).mean(1) * 1e-3 - 0.1 * Falling.calls
"""


def test_a_run_warns_once_on_screen_in_events_and_report(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    plugin, out = tmp_path / "scores.py", tmp_path / "out"
    plugin.write_text(JUDGE, "utf-8")
    prompts = tmp_path / "held_out.txt"
    prompts.write_text("".join(f"a {color} cat\n" for color in "abcdefgh"), "utf-8")
    recipe = make_recipe(
        algorithm__rewards=f"[{{name: '{plugin}:Rising', label: up}}]",
        algorithm__eval_rewards=f"[{{name: '{plugin}:Falling', label: judge}}]",
        data__held_out=str(prompts),
        evaluation="{images: 24, images_per_prompt: 2, batch_size: 16}",
        logging="{watch_every: 1, watch_images: 16, samples_every: 99, sample_count: 2}",
        checkpoints__every=2,
        steps=4,
    )
    notes = Notes()
    run.run(recipe, out, callback=notes)
    told = [note for note in notes.heard if "reward hacking is likely" in note]
    assert len(told) == 1
    assert "step 2: " in told[0]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert rows
    assert all({"watch/reward", "watch/judge", "watch/diversity"} <= row.keys() for row in rows)
    assert all(row["timing"]["watch"] > 0 for row in rows)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text("utf-8").splitlines()]
    assert [event["step"] for event in events] == [2]
    report.write_report(out)
    assert "reward hacking is likely" in (out / "report.html").read_text("utf-8")
    # A resumed run measures the same prompts and noise, and knows what was said.
    measured = (out / "evaluation/watch.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in measured] == [0, 1, 2, 3, 4]
    assert [len(json.loads(line)["reward"]) for line in measured] == [8] * 5
    again = Notes()
    run.run(recipe.model_copy(update={"steps": 5}), out, resume=True, callback=again)
    assert not [note for note in again.heard if "reward hacking" in note]
    assert (out / "evaluation/watch.jsonl").read_text("utf-8").splitlines()[:5] == measured


def test_without_a_trained_reward_unseen_scorers_are_measured_and_nothing_warns(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    plugin, out, notes = tmp_path / "scores.py", tmp_path / "out", Notes()
    plugin.write_text(JUDGE, "utf-8")
    recipe = make_recipe(
        algorithm__rewards="[]",
        algorithm__eval_rewards=f"[{{name: '{plugin}:Falling', label: judge}}]",
        evaluation="{images: 24, images_per_prompt: 2, batch_size: 16}",
        logging="{watch_every: 1, watch_images: 16, samples_every: 99, sample_count: 2}",
        steps=3,
    )
    run.run(recipe, out, callback=notes)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    judged = [row["watch/judge"] for row in rows]
    assert judged == sorted(judged, reverse=True)
    assert judged[0] > judged[-1]
    assert not any("watch/reward" in row for row in rows)
    assert not [note for note in notes.heard if "reward hacking" in note]


class Notes(TrainCallback):
    def __init__(self) -> None:
        self.heard = list[str]()

    def on_message(self, text: str) -> None:
        self.heard.append(text)


def test_rounding_is_judged_once_an_occurrence(make_recipe: MakeRecipe) -> None:
    judge = Bf16Monitor(make_recipe(optimization__generator__warmup_steps=10))

    def take(step: int, drift: float, unmoved: float) -> list[str]:
        measured: dict[str, Any] = {"bf16_drift": drift, "bf16_unmoved": unmoved}
        return judge.update(step, {"generator": measured, "assistant": {}})

    assert take(5, 0.0016, 1.0) == []  # warming up
    (text,) = take(15, 0.0016, 0.995)
    assert "99.5% of the generator's bf16 weights have not moved" in text
    assert take(20, 0.0016, 0.995) == []
    (text,) = take(25, 0.01, 0.5)
    assert "differ from their float32 masters by 1.00%" in text
    assert [len(take(*values)) for values in ((30, 0.001, 0.5), (35, float("nan"), 0.999))] == [0, 2]


def test_bf16_copies_are_compared_with_their_masters(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    stages = [make_recipe(optimization__precision="bf16", optimization__zero_stage=zero) for zero in (0, 1, 3)]
    run_ranks(1, tmp_path, compare_copies, [recipe.optimization for recipe in stages])


def compare_copies(rank: int, stages: list[Optimization]) -> None:
    for settings in stages:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1)).bfloat16()
        engine = DeepSpeedEngine(module, settings.generator, 1, 4, settings)
        inputs = torch.randn(4, 64, dtype=torch.bfloat16)

        def step(rate: float, engine: DeepSpeedEngine = engine, inputs: Tensor = inputs) -> dict[str, float]:
            engine.backward(engine(inputs).float().square().mean())
            engine.step(rate)
            return engine.bf16_drift()

        assert engine.bf16_drift()["bf16_drift"] < 2**-8
        small, large = step(1e-7), step(1e-2)
        assert small["bf16_unmoved"] > 0.9
        assert large["bf16_unmoved"] < 0.1
        assert 1e-4 < large["bf16_drift"] < 2**-8
        for _, weights in engine.full_parameters():  # what is averaged and exported: masters, not their copies
            assert not torch.equal(weights, weights.bfloat16().float())
        with torch.no_grad():  # a copy that is none
            parameter = next(engine.module.parameters())
            getattr(parameter, "ds_tensor", parameter).mul_(1.1)
        assert engine.bf16_drift()["bf16_drift"] > 0.01
