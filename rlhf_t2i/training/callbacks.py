"""Progress reporting: what a run tells the CLI's progress bar, a notebook or nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_t2i.training.state import TrainState

if TYPE_CHECKING:
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

    def on_message(self, text: str) -> None:
        """A message for the user: a warning, a restart, the checkpoint resumed from."""
