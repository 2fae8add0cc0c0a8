"""What is logged every step: ``metrics.jsonl``, one JSON object per generator step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_t2i.engines.base import learning_rate
from rlhf_t2i.families import flops
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.stopwatch import WAIT
from rlhf_t2i.roles.trained import Update
from rlhf_t2i.roles.worker import Reading
from rlhf_t2i.training.state import TrainState

Metrics = dict[str, Any]
"""One line of metrics.jsonl: numbers by name, and objects of them."""
_QUARTERS = ("t000-249", "t250-499", "t500-749", "t750-999")
"""Of the timesteps in thousandths; with continuous ones a name's last number stands for all up to the next."""


def step_metrics(
    recipe: Recipe,
    state: TrainState,
    learner: Sequence[Update],
    assistant: Sequence[Mapping[str, float]],
    seconds: Mapping[str, float],
    readings: Mapping[str, Reading],
) -> Metrics:
    """The metrics of one generator step.

    Args:
        recipe: The recipe.
        state: After the step.
        learner: Every rank's report: per-sample measurements and the gradient norm.
        assistant: The reports of the assistant's rounds since the last step.
        seconds: Wall time of the step and its phases.
        readings: Every process's busy seconds, bytes sent and peak memory.
    """
    samples: dict[str, np.ndarray] = {
        name: np.concatenate([np.asarray(rank.samples[name], dtype=np.float64) for rank in learner])
        for name in learner[0].samples
    }
    timesteps, cosines = samples.pop("timestep"), samples.pop("grad_cosine", np.zeros(0))
    metrics: Metrics = {"step": state.step, "images": state.step * recipe.optimization.batch_size}
    for name, values in samples.items():
        metrics[name] = float(values.mean())
        if name.startswith("reward/"):
            metrics[name.replace("reward/", "reward_std/", 1)] = float(values.std())
    if len(angles := cosines[~np.isnan(cosines)]):
        metrics["grad_cosine"] = float(angles.mean())
    quarters = np.minimum(timesteps // 250, 3)
    for number, name in enumerate(_QUARTERS):
        if (quarters == number).any():
            metrics[f"delta_norm/{name}"] = float(samples["delta_norm"][quarters == number].mean())
    if assistant:
        metrics["assistant_loss"] = float(np.mean([r["loss"] for r in assistant]))
        metrics["param_grad_norm/assistant"] = assistant[-1]["grad_norm"]
        metrics["lr/assistant"] = learning_rate(recipe.optimization.assistant, state.rounds - 1)
    metrics["param_grad_norm/generator"] = learner[0].grad_norm
    metrics["bad_steps"] = state.bad_steps
    metrics["lr/generator"] = learning_rate(recipe.optimization.generator, state.step - 1)
    metrics["timing"] = {**seconds, **_timing(seconds["step"], readings)}
    rates = [reading.matmul_rate for reading in readings.values()]
    if all(rates):
        mfu = flops.utilization(flops.of_update(recipe, len(assistant)), seconds["step"], rates)
        if mfu is not None:
            metrics["mfu"] = mfu
    metrics["memory"] = {process: reading.memory for process, reading in readings.items()}
    return metrics


def _timing(step: float, readings: Mapping[str, Reading]) -> Metrics:
    busy, idle = {}, {}
    for process, reading in readings.items():
        worked = {role: s for role, s in reading.seconds.items() if role != WAIT}
        busy.update({f"{process}/{role}": round(s, 6) for role, s in worked.items()})
        idle[process] = round(max(0.0, 1 - sum(worked.values()) / step), 4)
    return {"busy": busy, "idle": idle, "bytes": sum(reading.sent for reading in readings.values())}


def reward_term(recipe: Recipe, metrics: Metrics) -> float | None:
    """``sum_i alpha_i r_i`` of (3.3), the mean over the step's batch; None for a recipe without rewards.

    For a reward that learns: its scorer's mean over the lesson before the step, not what it predicts.
    """
    rewards = recipe.algorithm.rewards
    named = {r.key: f"online/{r.key}/true" for r in rewards}
    names = {key: name if name in metrics else f"reward/{key}" for key, name in named.items()}
    return sum(reward.scale * metrics[names[reward.key]] for reward in rewards) if rewards else None
