"""A run from its recipe to its report: what is checked first, and how it goes on when processes are lost.

The training itself is in :mod:`rlhf_t2i.training.loop`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf_t2i.algorithm import prompts
from rlhf_t2i.cluster.base import Cluster
from rlhf_t2i.errors import ProcessLost, RunError, UsageError
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools import report
from rlhf_t2i.training import checkpoints
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.folder import RunFolder
from rlhf_t2i.training.interrupts import Signals, Stopped
from rlhf_t2i.training.loop import Trainer
from rlhf_t2i.training.state import TrainState
from rlhf_t2i.utils import files


def run(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    allow_recipe_change: bool = False,
    address: str | None = None,
    callback: TrainCallback | None = None,
    command: str = "",
) -> None:
    """Align a generator as a recipe says.

    Args:
        recipe: What to do.
        out: The run's folder; created, and refused when it holds another run.
        resume: Continue from the newest whole checkpoint in ``out``.
        allow_recipe_change: Resume although the recipe's meaning has changed.
        address: An existing Ray cluster to join.
        callback: Receives the progress.
        command: The command line, for the record.

    Raises:
        UsageError: The recipe or a file is wrong; nothing was started.
        RunError: Something failed while running.
        Stopped: A signal arrived; while the run trained a checkpoint was written.
    """
    callback, folder = callback or TrainCallback(), RunFolder(out)
    signals = Signals(callback)
    try:
        with signals:
            recipe = _checked(recipe, folder.revisions() if resume else None)
            with files.exclusive(folder.path, "run"):
                _Run(recipe, folder, address, callback, signals).go(resume, allow_recipe_change, command)
    except OSError as error:
        if error.errno not in files.DISK:
            raise
        raise files.not_written(Path(error.filename or folder.path), error.strerror) from error
    except KeyboardInterrupt:
        if signals.asked is None or signals.again:
            raise
        raise Stopped(signals.asked, begun=folder.recipe.exists()) from None


def _checked(recipe: Recipe, revisions: dict[str, str] | None) -> Recipe:
    """The recipe with its hub models pinned, once its plugins, prompts and model folders were found sound."""
    import torch

    from rlhf_t2i.families import snapshot
    from rlhf_t2i.families.loading import ModelStore
    from rlhf_t2i.families.pins import pin
    from rlhf_t2i.roles.worker import check_plugins

    check_plugins(recipe)
    recipe = pin(recipe, revisions)
    for file in (recipe.data.prompts, recipe.data.held_out):
        if file:
            prompts.read(file, recipe.data.column)
    ModelStore(recipe.models, torch.device("cpu")).check()
    snapshot.fetch(recipe.models)
    return recipe


@dataclass
class _Run:
    """A run whose recipe is sound and whose folder is its own."""

    recipe: Recipe
    folder: RunFolder
    address: str | None
    callback: TrainCallback
    signals: Signals

    def go(self, resume: bool, allow_recipe_change: bool, command: str) -> None:
        """Start the roles, train, and write the report."""
        if resume:
            changed = self.folder.compare_recipe(self.recipe, allow_recipe_change)
            saved, state = self._newest()
            if changed:
                self.callback.on_message(f"the recipe has changed: {', '.join(changed)}")
        else:
            saved, state = None, TrainState()
            self.folder.create(self.recipe)
        try:
            self.callback.on_phase("starting the roles")
            cluster = self._start()
        except BaseException:
            if not resume:
                self.folder.discard()
            raise
        with self.folder.record(self.recipe, command):
            self._train_with_restarts(cluster, saved, state)
        self.callback.on_phase("writing the report")
        report.write_report(self.folder.path)

    def _start(self) -> Cluster:
        from rlhf_t2i.cluster.start import start

        return start(self.recipe, self.folder.failures, self.address)

    def _train_with_restarts(self, cluster: Cluster, saved: Path | None, state: TrainState) -> None:
        """Train; whenever a process that trains is lost, go on from the newest checkpoint on a fresh cluster.

        Raises:
            RunError: It was lost more often than ``placement.max_restarts``.
        """
        limit, restarts = self.recipe.placement.max_restarts, 0
        running: Cluster | None = cluster
        while True:
            try:
                running = running or self._start()  # a process lost meanwhile is one more restart
                self._train(running, saved, state)
                return
            except ProcessLost as lost:
                if restarts == limit:
                    raise RunError(f"{lost}; restored {restarts} times already (placement.max_restarts)") from lost
                restarts += 1
                saved, state = self._newest()
                self.callback.on_message(
                    f"{lost}; starting again from {saved.name if saved else 'the beginning'} "
                    f"(restart {restarts} of {limit})"
                )
                running = None

    def _train(self, cluster: Cluster, saved: Path | None, state: TrainState) -> None:
        """Train on a fresh cluster, from a checkpoint or the beginning; the cluster is closed whatever happens."""
        try:
            if saved is not None:
                for sentence in checkpoints.restore(cluster, saved):
                    self.callback.on_message(sentence)
                cluster.sync_generator()
                self.callback.on_message(f"resuming from {saved.name}")
            self.folder.update_recipe(self.recipe, state.step)  # only now: what cannot be restored changes nothing
            Trainer(self.recipe, self.folder, cluster, self.callback, state, self.signals).run()
        finally:
            cluster.close()

    def _newest(self) -> tuple[Path | None, TrainState]:
        """The newest whole checkpoint, and where the run stood there."""
        saved, state, warnings = checkpoints.find(self.folder.path)
        for warning in warnings:
            self.callback.on_message(warning)
        if saved is None:
            self.callback.on_message("no checkpoint was written yet: starting from the beginning")
        return saved, state


__all__ = ["RunError", "Stopped", "Trainer", "UsageError", "run"]
