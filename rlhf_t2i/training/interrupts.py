"""Signals: during training the first one waits for a checkpoint; otherwise, and the second one, exits immediately."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rlhf_t2i.errors import Stopped
from rlhf_t2i.training.callbacks import TrainCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
"""Besides the usual three the one that job systems send before a time limit (``sbatch --signal=USR1@120``), and that of
``ulimit -t``: without a handler both would end the process at once."""
_LEFT = (signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
"""Those that stay as they are where they are ignored (``nohup``), or the Python program has its own answer."""


class SignalHandler:
    """Handles Ctrl-C and the other :data:`SIGNALS` while the context is open.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Args:
        callback: Receives the message that a signal arrived.
        begun: Whether there is a run to resume.

    Attributes:
        requested: The first signal; None before it.

    Raises:
        Stopped: On exit, if a signal ended the block.
    """

    def __init__(self, callback: TrainCallback, begun: Callable[[], bool] = lambda: True) -> None:
        self._callback, self._begun = callback, begun
        self.requested: int | None = None
        self._repeated = self._deferred = False
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> SignalHandler:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS if _is_free(number)}
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if isinstance(error, KeyboardInterrupt) and self.requested is not None:
            raise Stopped(self.requested, begun=self._begun(), repeated=self._repeated) from None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In the block the first signal only sets :attr:`requested`; the block checks it where it can end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            self._repeated = True
            raise KeyboardInterrupt
        self.requested = number
        if not self._deferred:
            raise KeyboardInterrupt  # unlike an Exception, no library takes it for an error of its own
        name = signal.Signals(number).name
        self._callback.on_message(f"{name}: the current step completes, then a checkpoint is written")


def _is_free(number: signal.Signals) -> bool:
    """Whether a signal is to be handled: no one else does, but perhaps the handler around this one."""
    handler = signal.getsignal(number)
    ours = isinstance(getattr(handler, "__self__", None), SignalHandler)
    return number not in _LEFT or handler is signal.SIG_DFL or ours
