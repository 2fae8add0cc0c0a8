"""Where a process spends its time: exclusive seconds by label, and bytes sent to other processes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

WAIT = "wait"
"""The label of time spent waiting for other processes."""


class Stopwatch:
    """Nested spans, each charged only for its own time. One thread of a process uses it."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._mark = time.perf_counter()
        self.bytes_sent = 0

    @contextmanager
    def span(self, label: str) -> Iterator[None]:
        """Charge what happens inside to ``label``, except for spans opened within."""
        self._charge()
        self._open.append(label)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def current(self) -> str | None:
        """The label of the innermost open span; may be asked from another thread."""
        return next(iter(self._open[-1:]), None)

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._mark
        self._mark = now

    def read(self) -> tuple[dict[str, float], int]:
        """Seconds by label and bytes sent since the last reading."""
        seconds, sent = dict(self._seconds), self.bytes_sent
        self._seconds.clear()
        self.bytes_sent = 0
        return seconds, sent


stopwatch = Stopwatch()
"""The process's own."""
