"""Progress on standard error: a bar in a terminal or a notebook, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import progress
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn

from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.state import TrainState
from rlhf_t2i.training.trackers import scalars
from rlhf_t2i.utils.inputs import Json
from rlhf_t2i.utils.terminal import PlainConsole

if TYPE_CHECKING:
    from rlhf_t2i.evaluation.run import Progress

_SECONDS_BETWEEN_LINES = 10.0


class TrainProgress(TrainCallback):
    """A run's reward, seconds per step and time left.

    Args:
        steps: Of the run.
    """

    def __init__(self, steps: int) -> None:
        self._console = PlainConsole(stderr=True)
        self._drawn = self._console.is_terminal or self._console.is_jupyter
        self._bar = progress.Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[details]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._drawn,
        )
        self._steps = steps
        self._task = self._bar.add_task("starting", total=steps, details="")
        self._first = True
        self._seconds: float | None = None
        self._began = self._spoke = time.monotonic()

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def on_phase(self, text: str) -> None:
        """Something long begins."""
        self._bar.update(self._task, description=text[:40])
        if not self._drawn:
            self._print(text)

    def on_step(self, state: TrainState, metrics: Mapping[str, Json]) -> None:
        """A generator step is done."""
        numbers = dict(scalars(metrics))
        seconds = numbers["timing/step"]
        smooth = seconds if self._seconds is None else 0.9 * self._seconds + 0.1 * seconds
        rewards = [f"{k.removeprefix('reward/')} {v:.4f}" for k, v in numbers.items() if k.startswith("reward/")]
        used = [f"MFU {numbers['mfu']:.0%}"] if "mfu" in numbers else []
        details = ", ".join([*rewards[:2], f"{smooth:.2f} s/step", *used])
        # The first step holds the assistant's warm-up, which says nothing of the time left.
        self._first, self._seconds = False, None if self._first else smooth
        self._bar.update(self._task, description="training", completed=state.step, details=details)
        if not self._drawn and time.monotonic() - self._spoke > _SECONDS_BETWEEN_LINES:
            left = (self._steps - state.step) * smooth
            self._print(f"step {state.step}/{self._steps}, {details}, {left:.0f} s left")

    def on_message(self, text: str) -> None:
        """A sentence for the user."""
        self._print(text)

    def _print(self, text: str) -> None:
        self._spoke = time.monotonic()
        self._console.print(f"[{self._spoke - self._began:5.0f} s] {text}")


@contextmanager
def phases(shown: bool = True) -> Iterator[Progress]:
    """A bar for each phase of a long command; where there is neither a terminal nor a notebook, a line now and then."""
    console = PlainConsole(stderr=True)
    drawn = console.is_terminal or console.is_jupyter
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    tasks: dict[str, TaskID] = {}
    spoke = time.monotonic()
    with progress.Progress(*columns, console=console, disable=not (shown and drawn)) as bar:

        def show(phase: str, done: int, total: int) -> None:
            nonlocal spoke
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)
            if shown and not drawn and time.monotonic() - spoke > _SECONDS_BETWEEN_LINES:
                spoke = time.monotonic()
                console.print(f"{phase}, {done} of {total}")

        yield show
