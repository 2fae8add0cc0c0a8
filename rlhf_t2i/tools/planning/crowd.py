"""Processes that compute beside a measurement, as those of a placement on one machine do."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event, Semaphore

import torch

from rlhf_t2i.errors import RunError

_CHECK_EVERY_S = 1.0


@contextmanager
def companions(count: int, threads: int, make: Callable[..., Callable[[], None]], *args: object) -> Iterator[None]:
    """Run other processes, all of which compute from when this opens until it closes.

    Args:
        count: How many.
        threads: CPU threads of each.
        make: A function of a module. Returns what they call again and again.
        args: Of ``make``; pickled.

    Raises:
        RunError: One of them ended before it computed.
    """
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Semaphore(0), context.Event()
    started = [
        context.Process(target=_compute, args=(threads, ready, stop, make, *args), daemon=True) for _ in range(count)
    ]
    try:
        for process in started:
            process.start()
        for _ in started:
            while not ready.acquire(timeout=_CHECK_EVERY_S):
                if not all(process.is_alive() for process in started):
                    raise RunError("a process that should compute beside the measurement ended")
        yield
    finally:
        stop.set()
        for process in started:
            if process.pid is not None:
                process.join()


def _compute(
    threads: int, ready: Semaphore, stop: Event, make: Callable[..., Callable[[], None]], *args: object
) -> None:
    torch.set_num_threads(threads)
    run = make(*args)
    run()
    ready.release()
    while not stop.is_set():
        run()
