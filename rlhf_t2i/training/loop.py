"""Algorithm 1, with checkpoints, previews and the evaluation before and after around it."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from rlhf_t2i.algorithm.prompts import PromptStream
from rlhf_t2i.cluster.base import Cluster
from rlhf_t2i.errors import ProcessLost, RunError, Stopped, option
from rlhf_t2i.families import export
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.roles.trained import Update
from rlhf_t2i.roles.worker import Reading
from rlhf_t2i.training import checkpoints, model_card
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.evaluator import Evaluator
from rlhf_t2i.training.folder import RunFolder
from rlhf_t2i.training.interrupts import SignalHandler
from rlhf_t2i.training.log import RunLog
from rlhf_t2i.training.metrics import reward_term, step_metrics
from rlhf_t2i.training.online import OnlineRewards
from rlhf_t2i.training.overlap import Updates
from rlhf_t2i.training.run_prompts import RunPrompts
from rlhf_t2i.training.state import TrainState
from rlhf_t2i.utils import files


@dataclass
class Trainer:
    """One run over a cluster of roles.

    Attributes:
        recipe: The recipe.
        prompts: Its prompts.
        out: The run's folder.
        cluster: The roles.
        callback: Receives the progress.
        state: Position of the run; updated in place.
        signals: Signals that ask the run to stop.
    """

    recipe: Recipe
    prompts: RunPrompts
    out: RunFolder
    cluster: Cluster
    callback: TrainCallback
    state: TrainState
    signals: SignalHandler

    def __post_init__(self) -> None:
        train, held_out, seed = self.prompts.train, self.prompts.held_out, self.recipe.seed
        self._generator_prompts = PromptStream(train, seed, "generator")
        self._assistant_prompts = PromptStream(train, seed, "assistant")
        self._log = RunLog(self.recipe, self.out, self.callback)
        stream = PromptStream(held_out, 0, "held out")
        self._evaluator = Evaluator(self.recipe, self.out, self.cluster, self.callback, stream, self._log.preview)
        self._online = OnlineRewards(self.recipe, self.cluster, train, self.state, self.callback.on_phase)
        self._updates = Updates(self.recipe, self.cluster)
        self._position: tuple[int, int, int] | None = None
        self._writing: checkpoints.Writing | None = None
        self._measured: checkpoints.Writing | None = None
        self._timing: dict[str, float] = {}  # of checkpoints, for the next line of metrics
        self._peaks: dict[str, int] = {}  # memory of each process since that line, while no step ran

    def run(self) -> None:
        """Train from ``state`` to the last step, and export the model.

        Raises:
            Stopped: A signal arrived; a checkpoint was written.
        """
        self._log.resume(self.state)
        self._evaluator.resume(self.state)
        try:
            with self.signals.deferred():
                if self.state == TrainState():
                    self._evaluator.evaluate("before", self.state.step, self._stop_if_requested)
                self._train()
                self._save()
                self._evaluator.evaluate("after", self.state.step, self._stop_if_requested)
                self._log.evaluated(self.state.step)
            self.callback.on_phase("writing the model")
            self._export()
        except ProcessLost as lost:
            self._finish_checkpoint()
            if self.signals.requested is not None:  # whoever asked to stop does not wait for a restart
                raise RunError(f"{lost}, while stopping; continue with {option('resume')}") from lost
            raise
        except Exception:
            self._finish_checkpoint()
            raise
        finally:
            self._log.close()

    def _train(self) -> None:
        """Algorithm 1: K assistant rounds on fresh samples, then one generator update on fresh prompts.

        Rewards that learn do so beside the assistant.
        """
        algorithm, state = self.recipe.algorithm, self.state
        self._forget_work()  # the evaluation's
        while state.step < self.recipe.steps:
            began = time.perf_counter()
            self._online.start(self._stop_if_requested)
            rounds = algorithm.assistant_steps + (algorithm.assistant_warmup if state.step == 0 else 0)
            while state.round < rounds:
                self._assistant_round(rounds)
                self._stop_if_requested()
            self._online.finish()
            middle = time.perf_counter()
            reports, sent = self._generator_step()
            ended = time.perf_counter()
            seconds = {"step": ended - began, "assistant": middle - began, "generator": ended - middle}
            self._finish_step(reports, seconds | sent)
            self._stop_if_requested()

    def _assistant_round(self, rounds: int) -> None:
        """One update of the assistant; ``rounds`` is their number before the next generator update."""
        state, warmup = self.state, self.recipe.algorithm.assistant_warmup
        if warmup and state.step == 0 and state.round % 10 == 0:
            self.callback.on_phase(f"assistant warm-up, round {state.round} of {warmup}")
        left = rounds - state.round
        numbers = range(state.rounds, state.rounds + min(2, left))
        batches = {number: self._batch(self._assistant_prompts, number) for number in numbers}
        following = (state.step, self._batch(self._generator_prompts, state.step)) if left == 1 else None
        reports = self._updates.assistant(batches, following)
        self._count_skipped("assistant", reports)
        loss = sum(report.loss for report in reports) / len(reports)
        state.reports.append({"loss": loss, "grad_norm": reports[0].grad_norm})
        state.round += 1
        state.rounds += 1

    def _batch(self, stream: PromptStream, number: int) -> list[str]:
        size = self.recipe.optimization.batch_size
        return stream.batch(number * size, size)

    def _generator_step(self) -> tuple[list[Update], dict[str, float]]:
        step = self.state.step
        reports, sent = self._updates.generator(step, self._batch(self._generator_prompts, step))
        self._count_skipped("generator", reports)
        return reports, sent

    def _finish_step(self, learner: list[Update], seconds: dict[str, float]) -> None:
        """Advance the state; then metrics, monitors, previews and checkpoints where they are due."""
        recipe, state = self.recipe, self.state
        assistant, state.reports = state.reports, []
        learned, state.learned = state.learned, {}
        warnings, state.lesson_warnings = state.lesson_warnings, []
        state.step, state.round = state.step + 1, 0
        seconds |= self._timing | self._written()
        self._timing = {}
        readings, began = self._readings(), time.perf_counter()
        watched = self._evaluator.monitor(state.step)
        if watched is not None:
            seconds["watch"] = time.perf_counter() - began
        values, watch_warnings = watched or ({}, [])
        metrics = step_metrics(recipe, state, learner, assistant, seconds, readings) | learned | values
        state.add_reward(reward_term(recipe, metrics), recipe.checkpoints.every)
        self._log.step(state, metrics)
        for text in [*warnings, *watch_warnings]:
            self._log.warn(text, state.step)
        preview = state.step % recipe.logging.samples_every == 0
        if preview:
            self._evaluator.preview(state.step)
        save = state.step % recipe.checkpoints.every == 0 and state.step < recipe.steps
        if save:
            self._begin_checkpoint()
        if watched is not None or preview or save:
            self._forget_work()

    def _readings(self) -> dict[str, Reading]:
        """What every process has measured since the step began, with its peak memory since the last line of metrics."""
        readings, peaks, self._peaks = self.cluster.readings(), self._peaks, {}
        return {name: replace(r, memory=max(r.memory, peaks.get(name, 0))) for name, r in readings.items()}

    def _forget_work(self) -> None:
        """What the processes did between two steps is not the next step's; the memory that it took is remembered."""
        self._peaks = {name: reading.memory for name, reading in self._readings().items()}

    def _count_skipped(self, network: str, reports: list[Update]) -> None:
        """Count an update that the engines skipped because its gradient is not finite.

        Raises:
            RunError: More of the network's in a row than ``optimization.max_bad_steps``.
        """
        state, limit = self.state, self.recipe.optimization.max_bad_steps
        in_a_row = state.count_update(network, applied=math.isfinite(reports[0].grad_norm))
        if not in_a_row:
            return
        prompt = next((p for report in reports for p in report.bad), None)
        text = f"the {network}'s gradient is not finite" + (f" (prompt {prompt!r})" if prompt else "")
        if in_a_row > limit:
            raise RunError(
                f"step {state.step + 1}: {text}, for {in_a_row} of its updates in a row "
                f"(optimization.max_bad_steps: {limit}); lower the learning rate or look at that prompt"
            )
        done = (state.step, state.round + 1) if network == "assistant" else (state.step + 1, 0)
        self._log.warn(f"{text}; the update is skipped", *done)

    def _save(self) -> Path:
        """The checkpoint of this state, when it is whole."""
        self._begin_checkpoint()
        assert self._writing is not None
        return self._writing.wait()

    def _begin_checkpoint(self) -> None:
        """Start to write a checkpoint unless this state has one; metrics say how long training stopped for it."""
        self._online.finish()
        position = (self.state.step, self.state.round, sum(self.state.lessons.values()))
        if self._position == position:
            return
        began = time.perf_counter()
        if self._writing is not None:
            self._writing.wait()
            self._timing |= self._written()
        self._writing = checkpoints.begin(
            self.cluster, self.out.path, self.state, self.recipe.checkpoints, self._online.save
        )
        self._position, self._timing["checkpoint"] = position, time.perf_counter() - began

    def _written(self) -> dict[str, float]:
        """How long the writing of a checkpoint took, once after its end.

        Raises:
            RunError: It could not be written.
        """
        seconds = None if self._writing is None else self._writing.check()
        if seconds is None or self._writing is self._measured:
            return {}
        self._measured = self._writing
        return {"checkpoint_write": seconds}

    def _finish_checkpoint(self) -> None:
        """Let a checkpoint that is being written become whole when the run fails; its own failure is not the cause."""
        if self._writing is not None:
            with suppress(Exception):
                self._writing.wait()

    def _export(self) -> None:
        recipe = self.recipe
        weights = self.cluster.call_all("learner", LearnerRole.weights, self._evaluator.weights)[0]
        store = ModelStore(recipe.models, recipe.student, torch.device("cpu"), recipe.optimization.precision)
        card = partial(model_card.write_card, recipe, store, self.out.evaluation)
        export.write_model(store, weights, self.out.model, card)
        trained = recipe.optimization.generator
        # The moving average of merged weights has no low-rank factors: then the merged model is all there is.
        if trained.lora is not None and store.generator_family.loads_adapters and self._evaluator.weights == "raw":
            export.write_adapter(store, self.cluster.call_all("learner", LearnerRole.adapter)[0], self.out.adapter)
        else:  # that of an earlier recipe does not go with this model
            files.remove(self.out.adapter)

    def _stop_if_requested(self) -> None:
        if self.signals.requested is not None:
            raise Stopped(self.signals.requested, self._save())
