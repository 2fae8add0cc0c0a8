"""What a run logs: metrics.jsonl, events.jsonl and experiment trackers."""

from __future__ import annotations

from pathlib import Path

from rlhf_t2i.evaluation import compare
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import history
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.folder import RunFolder
from rlhf_t2i.training.metrics import Metrics
from rlhf_t2i.training.state import TrainState
from rlhf_t2i.training.trackers import Trackers
from rlhf_t2i.utils import files

_COLUMNS = ["measure", "kind", "before", "after", "change", "standard_error", "ratio", "verdict"]


class RunLog:
    """The logs of one run.

    Args:
        recipe: The recipe.
        out: The run's folder.
        callback: Receives the metrics and warnings too.
    """

    def __init__(self, recipe: Recipe, out: RunFolder, callback: TrainCallback) -> None:
        self._metrics, self._events, self._out, self._callback = out.metrics, out.events, out.path, callback
        self._trackers = Trackers(recipe.logging.trackers, out.path, callback.on_message)

    def resume(self, state: TrainState) -> None:
        """Drop the rows of updates that a resumed run repeats, and rows cut short by a kill.

        Raises:
            UsageError: A row that the run goes on from is damaged or missing.
        """
        for path, read in ((self._metrics, history.metrics), (self._events, history.events)):
            files.rewrite_lines(path, read(path, state).rows)

    def step(self, state: TrainState, metrics: Metrics) -> None:
        """Log a generator step; the row is on the disk when this returns."""
        files.append_line(self._metrics, metrics)
        self._trackers.log(state.step, metrics)
        self._callback.on_step(state, metrics)

    def preview(self, step: int, path: Path) -> None:
        """Log a grid of samples, the file ``path``."""
        self._trackers.log_image("samples", path, step)
        self._callback.on_preview(self._out, step)

    def evaluated(self, step: int) -> None:
        """Log the before/after table."""
        rows = compare.of_run(self._out / "evaluation").rows
        if not rows:
            return
        cells: list[list[str | float]] = [
            [r.key, r.kind, r.before, r.after, r.difference, r.error, r.ratio, r.verdict] for r in rows
        ]
        self._trackers.log_table("before_after", _COLUMNS, cells, step)

    def warn(self, text: str, step: int, round_: int = 0) -> None:
        """Log a warning for the user and the report.

        Args:
            text: One sentence.
            step: Generator updates done.
            round_: Assistant rounds of the next step done; 0 for a warning about step ``step`` itself.
        """
        named = step + 1 if round_ else step
        self._callback.on_message(f"step {named}: {text}")
        files.append_line(self._events, {"step": named, "after": [step, round_], "text": text})

    def close(self) -> None:
        """Close the trackers."""
        self._trackers.close()
