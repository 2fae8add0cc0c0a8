"""How fast collectives are between the processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import distributed

from rlhf_t2i.errors import RunError
from rlhf_t2i.tools.planning.speed import Links

_TIMES = 7
_PATIENCE = timedelta(minutes=2)
"""For the others to start, and in a collective: where one has died, the rest end."""
_SMALLEST = 256
"""Numbers of the small all-reduce, whose seconds are those before the first byte."""


def measure(ranks: int, threads: int, numbers: int) -> Links:
    """Time all-reduces of float32 over gloo, on loopback.

    Args:
        ranks: Processes that take part.
        threads: CPU threads of each.
        numbers: In one all-reduce; the rate depends on it.

    Raises:
        RunError: One of the processes ended early.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = context.Pipe(duplex=False)
        meeting = Path(folder, "ranks").as_uri()
        started = [
            context.Process(target=_take_part, args=(rank, ranks, threads, numbers, meeting, sender), daemon=True)
            for rank in range(ranks)
        ]
        for process in started:
            process.start()
        sender.close()  # so that the last process's end is read as one
        try:
            small, large = receiver.recv()
        except EOFError:
            raise RunError("a process that should have timed the collectives of this machine ended") from None
        finally:
            for process in started:
                process.join()
    sent = 2 * (ranks - 1) / ranks * 4 * numbers  # a ring's
    return Links(sent / max(large - small, 1e-9), start=small)


def _take_part(rank: int, ranks: int, threads: int, numbers: int, meeting: str, sender: Connection) -> None:
    torch.set_num_threads(threads)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=_PATIENCE)
    found = [_seconds(torch.zeros(size)) for size in (_SMALLEST, numbers)]
    if rank == 0:
        sender.send(tuple(found))
    distributed.destroy_process_group()


def _seconds(tensor: torch.Tensor) -> float:
    """Of one all-reduce, the median of several after a first one."""
    distributed.all_reduce(tensor)
    taken = []
    for _ in range(_TIMES):
        distributed.barrier()
        began = time.perf_counter()
        distributed.all_reduce(tensor)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
