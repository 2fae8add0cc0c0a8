"""What a run measures on held-out prompts: previews, monitors, and the evaluation before and after training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlhf_t2i.algorithm.prompts import PromptStream
from rlhf_t2i.cluster.base import Cluster
from rlhf_t2i.evaluation.held_out import HeldOut
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.trained import TrainedRole
from rlhf_t2i.training import history
from rlhf_t2i.training.bf16 import Bf16Monitor
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.folder import RunFolder
from rlhf_t2i.training.hacking import HackingMonitor
from rlhf_t2i.training.state import TRAINED_ROLES, TrainState


class Evaluator:
    """Samples held-out prompts with the weights that are exported, and watches what they score.

    Args:
        recipe: The recipe.
        out: The run's folder.
        cluster: The roles.
        callback: Receives the progress.
        stream: The held-out prompts, or the training prompts if there are none.
        on_preview: Called with the step and the file of every preview.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: RunFolder,
        cluster: Cluster,
        callback: TrainCallback,
        stream: PromptStream,
        on_preview: Callable[[int, Path], None],
    ) -> None:
        self._on_preview = on_preview
        self._recipe, self._out, self._cluster, self._callback = recipe, out, cluster, callback
        self._held_out = HeldOut(recipe, cluster, stream)
        self._hacking = HackingMonitor(out.evaluation / history.WATCH, recipe)
        self._bf16 = Bf16Monitor(recipe)
        self.weights = "ema" if recipe.optimization.ema is not None else "raw"

    def resume(self, state: TrainState) -> None:
        """Continue the monitors of a run from its state."""
        self._hacking.resume(state)

    def preview(self, step: int) -> None:
        """Write a grid of samples."""
        self._load_ema()
        path = self._out.samples / f"step_{step:06d}.png"
        self._held_out.preview(self.weights, path)
        self._on_preview(step, path)

    def monitor(self, step: int) -> tuple[dict[str, float], list[str]] | None:
        """The monitors' values for the metrics, and their warnings; None unless ``logging.watch_every`` is due."""
        every = self._recipe.logging.watch_every
        if not every or step % every:
            return None
        self._load_ema()
        samples = self._held_out.draw(self._held_out.prompts()[: self._held_out.monitored()], self.weights)
        self._callback.on_measurement(step, samples)
        values, warnings = self._hacking.update(step, samples)
        drifts = {name: self._cluster.call_all(role, TrainedRole.bf16_drift)[0] for name, role in TRAINED_ROLES.items()}
        for name, drift in drifts.items():
            values |= {f"{measured}/{name}": value for measured, value in drift.items()}
        return values, warnings + self._bf16.update(step, drifts)

    def evaluate(self, when: str, step: int, between: Callable[[], None]) -> None:
        """Evaluate ``before`` or ``after`` training, on the same prompts and noise.

        Args:
            when: ``before`` or ``after``.
            step: Generator updates done.
            between: Called after every batch; may raise. All of them can take as long as hundreds of steps.
        """
        self._callback.on_phase(f"measuring {when} training")
        if when == "before" and not self._recipe.data.held_out:
            self._callback.on_message(
                "data.held_out is not set: previews and the before/after table use training prompts"
            )
        self.preview(step)

        def progress(done: int, total: int) -> None:
            self._callback.on_phase(f"measuring {when} training: {done} of {total} images")
            between()

        samples = self._held_out.evaluate(self.weights, step, self._out.evaluation / when, progress)
        if when == "before" and self._recipe.logging.watch_every:
            first = samples.first(self._held_out.monitored())
            self._callback.on_measurement(0, first)
            self._hacking.update(0, first)

    def _load_ema(self) -> None:
        if self.weights == "ema":
            self._cluster.sync_generator("ema")
