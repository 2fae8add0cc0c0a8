"""Progress reporting: what a run tells the CLI's progress bar, a notebook or nobody."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_t2i.training.state import TrainState

if TYPE_CHECKING:
    from rlhf_t2i.evaluation.held_out import Samples
    from rlhf_t2i.training.metrics import Metrics


class TrainCallback:
    """Receives the progress of a run; does nothing. Override what you need."""

    def on_phase(self, text: str) -> None:
        """A phase that may take long begins."""

    def on_step(self, state: TrainState, metrics: Metrics) -> None:
        """A generator step is done.

        Args:
            state: After the step.
            metrics: The line of metrics.jsonl.
        """

    def on_measurement(self, step: int, samples: Samples) -> None:
        """Held-out prompts were drawn and scored for the monitors (``logging.watch_every``), at first before step 1.

        Args:
            step: Generator updates done.
            samples: Their images and scores.
        """

    def on_preview(self, out: Path, step: int) -> None:
        """A grid of samples was written, after step ``step``; the rows of metrics up to it are on the disk.

        Args:
            out: The run's folder.
            step: Generator updates done.
        """

    def on_message(self, text: str) -> None:
        """A message for the user: a warning, a restart, the checkpoint resumed from."""
