"""Run a function in processes of their own that form a torch.distributed world, without Ray."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing


def run_ranks(world: int, folder: Path, function: Callable[..., None], *args: Any) -> None:
    """Call ``function(rank, *args)`` in every rank; what one raises is raised here.

    Args:
        world: How many ranks.
        folder: For the ranks to find each other.
        function: Of a module, so that it can be sent.
        args: Sent with it.
    """
    torch.multiprocessing.spawn(_rank, (world, folder, function, args), nprocs=world)


def _rank(rank: int, world: int, folder: Path, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    from rlhf_t2i.engines.deepspeed import import_deepspeed

    import_deepspeed()
    method = f"file://{folder / f'rendezvous-{world}'}"  # no port to be taken by another
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=world)
    function(rank, *args)
    torch.distributed.destroy_process_group()
