"""The report while a run goes: rewritten at every preview."""

from __future__ import annotations

from pathlib import Path

from rlhf_t2i.errors import first_line
from rlhf_t2i.tools import report
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.metrics import Metrics
from rlhf_t2i.training.state import TrainState


class LiveReport(TrainCallback):
    """Writes ``OUT/report.html`` at every preview; everything else goes to another callback.

    A report that cannot be written is one message: it never ends a run.

    Args:
        callback: Receives all progress, too.
    """

    def __init__(self, callback: TrainCallback) -> None:
        self._callback, self._failed, self._step = callback, False, -1

    def on_phase(self, text: str) -> None:
        """See :class:`TrainCallback`."""
        self._callback.on_phase(text)

    def on_step(self, state: TrainState, metrics: Metrics) -> None:
        """See :class:`TrainCallback`."""
        self._callback.on_step(state, metrics)

    def on_message(self, text: str) -> None:
        """See :class:`TrainCallback`."""
        self._callback.on_message(text)

    def on_preview(self, out: Path, step: int) -> None:
        """See :class:`TrainCallback`."""
        try:
            if step != self._step:  # the evaluation after training previews the last step again
                report.write_report(out, live=True)
            self._step = step
        except Exception as error:  # of matplotlib, jinja or the disk: the run goes on, and ends with its own report
            if not self._failed:
                self._callback.on_message(f"report.html could not be written while training ({first_line(error)})")
            self._failed = True
        self._callback.on_preview(out, step)
