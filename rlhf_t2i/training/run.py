"""A run from its recipe to its exported model: checks, start of the roles, restarts when processes are lost.

The training itself is in :mod:`rlhf_t2i.training.loop`; the report is written by the caller (:mod:`rlhf_t2i.tools`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_t2i.cluster.base import Cluster
from rlhf_t2i.errors import ProcessLost, RunError, exit_in_plugin
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import checkpoints, history, online, run_prompts
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.folder import RunFolder
from rlhf_t2i.training.interrupts import SignalHandler
from rlhf_t2i.training.loop import Trainer
from rlhf_t2i.training.run_prompts import RunPrompts
from rlhf_t2i.training.state import TrainState
from rlhf_t2i.utils import files

if TYPE_CHECKING:
    from rlhf_t2i.families.store import ModelStore


@dataclass(frozen=True)
class RunResult:
    """Result of a finished run.

    Attributes:
        out: The run's folder, absolute.
        state: The state after the last step.
    """

    out: Path
    state: TrainState

    @property
    def model(self) -> Path:
        """The exported diffusers pipeline."""
        return self.out / "model"


def run(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    allow_recipe_change: bool = False,
    address: str | None = None,
    callback: TrainCallback | None = None,
    command: str = "",
) -> RunResult:
    """Align a generator as a recipe says.

    Args:
        recipe: The recipe.
        out: The run's folder; created. It must not hold another run.
        resume: Continue from the newest whole checkpoint in ``out``.
        allow_recipe_change: Resume although the recipe's meaning has changed.
        address: An existing Ray cluster to join.
        callback: Receives the progress.
        command: The command line, for ``run.json``.

    Raises:
        UsageError: The recipe or a file is wrong; nothing was started.
        RunError: Something failed while running.
        Stopped: A signal arrived; if the run was training, a checkpoint was written.
    """
    callback, folder = callback or TrainCallback(), RunFolder(out)
    try:
        with SignalHandler(callback, folder.recipe.exists) as signals, files.disk_errors(folder.path):
            callback.on_phase("checking the inputs")
            recipe = _checked(recipe, folder.revisions() if resume else None, callback)
            texts = RunPrompts.read(recipe)
            run_prompts.check_rewards(recipe, texts)
            changed = folder.compare_recipe(recipe, allow_recipe_change) if resume else []  # before prompts are encoded
            _encode(recipe, texts, callback)
            with files.exclusive(folder.path, "run"):
                state = _Run(recipe, texts, folder, address, callback, signals).go(resume, changed, command)
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit of a plugin, which would end the command with exit code 0
        raise exit_in_plugin(error) from error
    return RunResult(folder.path, state)


def _checked(recipe: Recipe, revisions: dict[str, str] | None, callback: TrainCallback) -> Recipe:
    """The recipe with its hub models and datasets pinned, after its plugins and model folders were checked."""
    from rlhf_t2i.families.pins import pin
    from rlhf_t2i.plugins import traits
    from rlhf_t2i.training import checks, model_card

    checks.check_plugins(recipe)
    traits.check_online_placement(recipe)
    recipe = pin(recipe, revisions)
    store = checks.check_models(recipe)
    _warn_of_other_steps(store, callback)
    model_card.fetch_licenses(store)
    return recipe


def _encode(recipe: Recipe, texts: RunPrompts, callback: TrainCallback) -> None:
    """Encode the prompts that ``models.embeddings`` lacks, if the recipe keeps embeddings."""
    if recipe.models.embeddings is None:
        return
    from rlhf_t2i.training.encoding import encode_prompts

    spoke = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal spoke
        if done in (0, total) or time.monotonic() - spoke > 5:
            spoke = time.monotonic()
            callback.on_phase(f"encoding prompts, {done} of {total}")

    encode_prompts(recipe, progress, texts)


def _warn_of_other_steps(store: ModelStore, callback: TrainCallback) -> None:
    """Say so when an exported generator will be called with other steps than it was trained for."""
    from rlhf_t2i.families import sources
    from rlhf_t2i.families.export import StudentFile

    source = sources.parse(store.models.generator)
    exported = StudentFile.read(Path(source.location)) if source.is_local else None
    steps = list(store.student.timesteps)
    if exported is not None and exported.timesteps != steps:
        callback.on_message(
            f"models.generator was exported for timesteps {exported.timesteps}, this recipe calls it at {steps}: "
            "set student.timesteps, unless that is meant"
        )


@dataclass
class _Run:
    """A run whose recipe is sound and whose folder is its own."""

    recipe: Recipe
    prompts: RunPrompts
    folder: RunFolder
    address: str | None
    callback: TrainCallback
    signals: SignalHandler
    restarts: int = 0

    def go(self, resume: bool, changed: list[str], command: str) -> TrainState:
        """Start the roles and train; returns the final state. ``changed`` says how a resumed run's recipe differs."""
        if resume:
            saved, state = self._newest()
            for message in history.check(self.folder, state):
                self.callback.on_message(message)
            if changed:
                self.callback.on_message(f"the recipe has changed: {', '.join(changed)}")
        else:
            saved, state = None, TrainState()
            self.folder.create(self.recipe)
        try:
            self.callback.on_phase("starting the roles")
            cluster = self._start(saved)
        except BaseException:
            if not resume:
                self.folder.discard()
            raise
        with self.folder.record(self.recipe, command):
            return self._train_with_restarts(cluster, saved, state)

    def _start(self, saved: Path | None) -> Cluster:
        """Start the roles; a process lost meanwhile is one restart."""
        from rlhf_t2i.cluster import base

        while True:
            try:
                return base.start(self.recipe, self.folder.failures, self.address)
            except ProcessLost as lost:
                self._count_restart(lost, saved)

    def _count_restart(self, lost: ProcessLost, saved: Path | None) -> None:
        limit = self.recipe.placement.max_restarts
        if self.restarts == limit:
            raise RunError(f"{lost}; restored {self.restarts} times already (placement.max_restarts)") from lost
        self.restarts += 1
        self.callback.on_message(
            f"{lost}; starting again from {saved.name if saved else 'the beginning'} "
            f"(restart {self.restarts} of {limit})"
        )

    def _train_with_restarts(self, cluster: Cluster, saved: Path | None, state: TrainState) -> TrainState:
        """Train; when a process that trains is lost, continue from the newest checkpoint on a fresh cluster.

        Raises:
            RunError: Processes were lost more often than ``placement.max_restarts``.
        """
        while True:
            try:
                self._train(cluster, saved, state)
                return state
            except ProcessLost as lost:
                saved, state = self._newest()
                self._count_restart(lost, saved)
            cluster = self._start(saved)

    def _train(self, cluster: Cluster, saved: Path | None, state: TrainState) -> None:
        """Train on a fresh cluster, from a checkpoint or the beginning; always closes the cluster."""
        try:
            if saved is not None:
                for message in checkpoints.restore(cluster, saved):
                    self.callback.on_message(message)
                online.restore(self.recipe, cluster, saved)
                cluster.sync_generator()
                self.callback.on_message(f"resuming from {saved.name}")
            # Only now: a checkpoint that fails to load leaves the recorded recipe as it was.
            self.folder.update_recipe(self.recipe, state.step)
            Trainer(self.recipe, self.prompts, self.folder, cluster, self.callback, state, self.signals).run()
        finally:
            cluster.close()

    def _newest(self) -> tuple[Path | None, TrainState]:
        """The newest whole checkpoint, and the state stored in it."""
        saved, state, warnings = checkpoints.find(self.folder.path)
        for warning in warnings:
            self.callback.on_message(warning)
        if saved is None:
            self.callback.on_message("no checkpoint was written yet: starting from the beginning")
        return saved, state
