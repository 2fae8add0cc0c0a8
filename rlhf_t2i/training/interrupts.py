"""SIGTERM and Ctrl-C: the first one waits for a checkpoint while a run trains; else, and the second one, at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_t2i.training.callbacks import TrainCallback


class Stopped(Exception):
    """A signal ended the run; what it had done stays.

    Args:
        number: The signal.
        saved: The checkpoint written for it, if one was.
        begun: Whether there is a run to continue.
    """

    def __init__(self, number: int, saved: Path | None = None, begun: bool = True) -> None:
        wrote = f"; checkpoint {saved}" if saved else ""
        told = "continue with --resume" if begun else "nothing was written"
        super().__init__(f"stopped by {signal.Signals(number).name}{wrote}; {told}")
        self.exit_code = 128 + number


class Signals:
    """Handlers of both signals, for as long as the context is open.

    Attributes:
        asked: The first signal that came.
        again: Whether another one came after it.
    """

    def __init__(self, callback: TrainCallback) -> None:
        self._callback = callback
        self.asked: int | None = None
        self.again = False
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While the block runs the first signal is only noted: the block looks at :attr:`asked` where it may end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            self.again = True
            raise KeyboardInterrupt
        self.asked = number
        if not self._held:
            raise KeyboardInterrupt  # no library takes it for an error of its own
        self._callback.on_message(
            f"{signal.Signals(number).name}: finishing what is at work, then writing a checkpoint"
        )
