"""The controller: Algorithm 1, with checkpoints, previews and the before/after table around it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_t2i.algorithm import prompts
from rlhf_t2i.cluster.base import Cluster
from rlhf_t2i.errors import ProcessLost, RunError, Stopped
from rlhf_t2i.evaluation.held_out import HeldOut
from rlhf_t2i.families import export
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import checkpoints
from rlhf_t2i.training.bf16 import Bf16Monitor
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.folder import RunFolder
from rlhf_t2i.training.hacking import Watch
from rlhf_t2i.training.interrupts import SignalHandler
from rlhf_t2i.training.metrics import StepLog, reward_term, step_metrics
from rlhf_t2i.training.state import TrainState
from rlhf_t2i.training.trackers import Trackers

TRAINED = {"generator": "learner", "assistant": "assistant"}
"""Trained networks, and the roles that train them."""


@dataclass
class Trainer:
    """One run over a cluster of roles.

    Attributes:
        recipe: The recipe.
        out: The run's folder.
        cluster: The roles.
        callback: Receives the progress.
        state: Position of the run; updated in place.
        signals: Signals that ask the run to stop.
    """

    recipe: Recipe
    out: RunFolder
    cluster: Cluster
    callback: TrainCallback
    state: TrainState
    signals: SignalHandler

    def __post_init__(self) -> None:
        data, seed = self.recipe.data, self.recipe.seed
        train = prompts.read(data.prompts, data.column)
        self._generator_prompts = prompts.PromptStream(train, seed, "generator")
        self._assistant_prompts = prompts.PromptStream(train, seed, "assistant")
        held_out = prompts.read(data.held_out, data.column) if data.held_out else train
        self._held_out = HeldOut(self.recipe, self.cluster, prompts.PromptStream(held_out, 0, "held out"))
        self._metrics = StepLog(self.out.metrics)
        self._events = StepLog(self.out.path / "events.jsonl")
        self._trackers = Trackers(self.recipe.logging.trackers, self.out.path, self.callback.on_message)
        self._watch = Watch(self.out.evaluation / "watch.jsonl", self.recipe)
        self._rounding = Bf16Monitor(self.recipe)
        self._saving: float | None = None
        self._saved: tuple[int, int, Path] | None = None

    def run(self) -> None:
        """Train to the end, from wherever ``state`` stands.

        Raises:
            Stopped: A signal arrived; a checkpoint was written.
        """
        self._metrics.drop_after(self.state)
        self._events.drop_after(self.state)
        self._watch.resume(self.state.step if self.state != TrainState() else -1)
        try:
            with self.signals.deferred():
                if self.state == TrainState():
                    self._measure("before")
                self._loop()
                self._save()
                self._measure("after")
            self.callback.on_phase("writing the model")
            weights = self.cluster.call_all("learner", "weights", self._weights)[0]
            recipe = self.recipe
            store = ModelStore(recipe.models, recipe.student, torch.device("cpu"), recipe.optimization.precision)
            export.write_model(store, weights, self.out.model)
        except ProcessLost as lost:
            if self.signals.requested is not None:  # who asked to stop shall not wait for a restart
                raise RunError(f"{lost}, while stopping; continue with --resume") from lost
            raise
        finally:
            self._trackers.close()

    def _loop(self) -> None:
        """Algorithm 1: K assistant rounds on fresh samples, then one generator update on fresh prompts."""
        recipe, state = self.recipe, self.state
        began = time.perf_counter()
        while state.step < recipe.steps:
            rounds = recipe.algorithm.assistant_steps + (recipe.algorithm.assistant_warmup if state.step == 0 else 0)
            if state.round < rounds:
                self._assistant_round()
            else:
                self._generator_step(began)
                began = time.perf_counter()
            self._stop_if_asked()

    def _assistant_round(self) -> None:
        state, size = self.state, self.recipe.optimization.batch_size
        if state.step == 0 and state.round % 10 == 0 and self.recipe.algorithm.assistant_warmup:
            self.callback.on_phase(
                f"assistant warm-up, round {state.round} of {self.recipe.algorithm.assistant_warmup}"
            )
        batch = self._assistant_prompts.batch(state.rounds * size, size)
        reports = self.cluster.call_all("assistant", "train", state.rounds, batch)
        self._judge("assistant", reports)
        state.reports.append(
            {"loss": sum(r["loss"] for r in reports) / len(reports), "grad_norm": reports[0]["grad_norm"]}
        )
        state.round += 1
        state.rounds += 1

    def _generator_step(self, began: float) -> None:
        state, size = self.state, self.recipe.optimization.batch_size
        batch = self._generator_prompts.batch(state.step * size, size)
        generator_began = time.perf_counter()
        reports = self.cluster.call_all("learner", "step", state.step, batch)
        self._judge("generator", reports)
        self.cluster.sync_generator()
        ended = time.perf_counter()
        assistant_reports, state.reports = state.reports, []
        state.step, state.round = state.step + 1, 0
        seconds = {"step": ended - began, "assistant": generator_began - began, "generator": ended - generator_began}
        if self._saving is not None:
            seconds["checkpoint"], self._saving = self._saving, None
        metrics = step_metrics(self.recipe, state, reports, assistant_reports, seconds, self.cluster.readings())
        warnings = self._monitor(metrics)
        state.add_reward(reward_term(self.recipe, metrics), self.recipe.checkpoints.every)
        self._metrics.append(metrics)
        self._trackers.log(state.step, metrics)
        self.callback.on_step(state, metrics)
        for text in warnings:
            self._warn(text, state.step)
        if state.step % self.recipe.logging.samples_every == 0:
            self._preview()
        if state.step % self.recipe.checkpoints.every == 0 and state.step < self.recipe.steps:
            self._save()

    def _save(self) -> Path:
        """Write a checkpoint, if there is none of this moment; the next step's metrics say how long that took."""
        step, round_ = self.state.step, self.state.round
        if self._saved is None or self._saved[:2] != (step, round_):
            began = time.perf_counter()
            saved = checkpoints.save(self.cluster, self.out.path, self.state, self.recipe.checkpoints)
            self._saving, self._saved = time.perf_counter() - began, (step, round_, saved)
        return self._saved[2]

    def _judge(self, network: str, reports: list[dict[str, Any]]) -> None:
        """Count an update that the engines skipped.

        Each network by itself: they take turns, so that a sound assistant would hide a generator that never moves.

        Raises:
            RunError: More of the network's in a row than ``optimization.max_bad_steps``.
        """
        state, limit = self.state, self.recipe.optimization.max_bad_steps
        if math.isfinite(reports[0]["grad_norm"]):
            state.bad_in_a_row.pop(network, None)
            return
        state.bad_steps += 1
        row = state.bad_in_a_row[network] = state.bad_in_a_row.get(network, 0) + 1
        prompt = next((p for report in reports for p in report.get("bad", [])), None)
        found = f"the {network}'s gradient is not finite" + (f" (prompt {prompt!r})" if prompt else "")
        if row > limit:
            raise RunError(
                f"step {state.step + 1}: {found}, for {row} of its updates in a row "
                f"(optimization.max_bad_steps: {limit}); lower the learning rate or look at that prompt"
            )
        done = (state.step, state.round + 1) if network == "assistant" else (state.step + 1, 0)
        self._warn(f"{found}; the update is skipped", *done)

    def _warn(self, text: str, step: int, round_: int = 0) -> None:
        """Tell the user, and keep it for the report; with how many steps, and rounds of the next one, were done."""
        named = step + 1 if round_ else step
        self.callback.on_message(f"step {named}: {text}")
        self._events.append({"step": named, "after": [step, round_], "text": text})

    def _monitor(self, metrics: dict[str, Any]) -> list[str]:
        """Every ``logging.watch_every`` steps: add the monitors' values to the metrics; returns their warnings."""
        every, step = self.recipe.logging.watch_every, self.state.step
        if not every or step % every:
            return []
        began = time.perf_counter()
        self._load_ema()
        samples = self._held_out.draw(self._held_out.prompts()[: self._held_out.monitored()], self._weights)
        found, warnings = self._watch.take(step, samples)
        drifts = {name: self.cluster.call_all(role, "bf16_drift")[0] for name, role in TRAINED.items()}
        for name, drift in drifts.items():
            found |= {f"{measured}/{name}": value for measured, value in drift.items()}
        metrics |= found
        metrics["timing"]["watch"] = time.perf_counter() - began
        return warnings + self._rounding.take(step, drifts)

    @property
    def _weights(self) -> str:
        """The weights that are shown, measured and exported."""
        return "ema" if self.recipe.optimization.ema is not None else "raw"

    def _load_ema(self) -> None:
        if self._weights == "ema":
            weights = self.cluster.call_all("learner", "weights", "ema")[0]
            self.cluster.call_all("generator", "load", "ema", weights)

    def _preview(self) -> None:
        self._load_ema()
        self._held_out.preview(self._weights, self.out.samples / f"step_{self.state.step:06d}.png")

    def _measure(self, when: str) -> None:
        """Evaluate ``before`` or ``after`` training, on the same prompts and noise."""
        self.callback.on_phase(f"measuring {when} training")
        if when == "before" and not self.recipe.data.held_out:
            self.callback.on_message(
                "data.held_out is not set: previews and the table before/after use training prompts"
            )
        self._preview()

        def progress(done: int, total: int) -> None:  # all of it can take as long as hundreds of steps
            self.callback.on_phase(f"measuring {when} training: {done} of {total} images")
            self._stop_if_asked()

        samples = self._held_out.evaluate(self._weights, self.state.step, self.out.evaluation / when, progress)
        if when == "before" and self.recipe.logging.watch_every:
            self._watch.take(0, samples.first(self._held_out.monitored()))

    def _stop_if_asked(self) -> None:
        if self.signals.requested is not None:
            raise Stopped(self.signals.requested, self._save())
