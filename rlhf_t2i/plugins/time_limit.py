"""Limit the time of a call in this process, for ``placement: local``. Over Ray the waiting process has the limit."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rlhf_t2i.errors import RunError, printable
from rlhf_t2i.plugins import guard

_SIGNAL = signal.SIGURG  # nobody else's, and ignored without a handler: one that comes late does no harm
_GRACE_S = 10.0  # for a call that waits in native code, where no signal interrupts it
_limits: list[_Limit] = []  # of the open blocks, the outermost first


@contextmanager
def limited(what: str, seconds: float, key: str) -> Iterator[None]:
    """Interrupt the block once it takes longer than ``seconds``. Blocks may be nested.

    A signal interrupts Python, and most of what Python waits for. Where it does not (a deadlock in native code) the
    process prints the message and ends with exit code 1, after a grace period. There is no limit outside the main
    thread: Python delivers signals to no other.

    Args:
        what: Begins the error message: ``reward 'color'``.
        seconds: The limit.
        key: The key of the recipe that sets it.

    Raises:
        RunError: The block took longer; names the line of the user's code that was interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(_SIGNAL, _interrupt)
    limit = _Limit(f"{what} did not return within {seconds:g} s ({key})")
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), limit.exceed)
    timer.daemon = True
    _limits.append(limit)
    timer.start()
    try:
        yield
    except KeyboardInterrupt as error:
        if not limit.interrupted:
            raise
        place = guard.author_line(error)
        raise RunError(f"{limit.message}{f'; it was at {place}' if place else ''}") from error
    finally:
        limit.over.set()
        timer.cancel()
        _limits.remove(limit)
        signal.signal(_SIGNAL, before)


class _Limit:
    """The limit of one block."""

    def __init__(self, message: str) -> None:
        self.message = message
        self.exceeded = self.interrupted = False
        self.over = threading.Event()

    def exceed(self) -> None:
        """Interrupt the main thread; if it does not end the block, end the process. Runs in the timer's thread."""
        self.exceeded = True
        signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)
        if not self.over.wait(_GRACE_S):
            print(f"rlhf-t2i: {printable(self.message)}", file=sys.stderr, flush=True)
            os._exit(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The handler. It raises what neither a library nor a plugin takes for an error of its own."""
    due = [limit for limit in _limits if limit.exceeded and not limit.interrupted]
    if due:
        due[0].interrupted = True
        raise KeyboardInterrupt
