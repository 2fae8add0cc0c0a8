"""Where a process spends its time: exclusive seconds by label, and bytes sent to other processes."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

WAIT = "wait"
"""The label of time that a thread spends waiting for other processes or threads."""


class Stopwatch:
    """Nested spans, each charged only for its own time. Every thread has spans of its own."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: dict[int, list[str]] = {}  # by thread
        self._mark: dict[int, float] = {}
        self._lock = threading.Lock()
        self.bytes_sent = 0

    @contextmanager
    def span(self, label: str) -> Iterator[None]:
        """Charge what happens inside to ``label``, except for spans opened within."""
        thread = threading.get_ident()
        self._charge(thread)
        self._open.setdefault(thread, []).append(label)
        try:
            yield
        finally:
            self._charge(thread)
            self._open[thread].pop()

    def waiting(self) -> bool:
        """Whether all threads with an open span wait; may be asked from another thread."""
        innermost = {labels[-1] for labels in list(self._open.values()) if labels}
        return innermost == {WAIT}

    def _charge(self, thread: int) -> None:
        now = time.perf_counter()
        labels = self._open.get(thread)
        if labels:
            with self._lock:
                self._seconds[labels[-1]] += now - self._mark[thread]
        self._mark[thread] = now

    def read(self) -> tuple[dict[str, float], int]:
        """Seconds by label and bytes sent since the last reading."""
        with self._lock:
            seconds, sent = dict(self._seconds), self.bytes_sent
            self._seconds.clear()
            self.bytes_sent = 0
        return seconds, sent


stopwatch = Stopwatch()
"""The process's own."""
