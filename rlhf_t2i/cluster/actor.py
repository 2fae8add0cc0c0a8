"""The Ray actor of one process of a group."""

from __future__ import annotations

import os
import socket
from typing import Any

import ray


class WorkerActor:
    """Builds its roles on request (trained ones need their peers' address first) and answers calls.

    A process without trained roles keeps nothing between calls, so Ray may restart it and repeat the call: the first
    call after a restart builds the roles again.
    """

    def __init__(self, spec: Any) -> None:
        from rlhf_t2i.roles.worker import set_threads

        self._spec = spec
        set_threads(spec.threads)
        self._worker: Any = None

    def rendezvous(self) -> tuple[str, int]:
        """An address and a free port on rank 0's machine for torch.distributed."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, int(probe.getsockname()[1])

    def build(self, master: tuple[str, int] | None) -> str:
        """Load the roles; with ``master``, join the group's process group first. Returns the device's name."""
        from rlhf_t2i.roles.worker import Worker

        if master is not None:
            _join(self._spec.rank, self._spec.world, master)
        self._worker = Worker(self._spec)
        return str(self._worker.device)

    def connect(self, clients: dict[str, Any]) -> None:
        """Tell the trained roles where the others are; their answers belong on this process's device."""
        for client in [c for value in clients.values() for c in (value if isinstance(value, list) else [value])]:
            client.device = self._worker.device
        self._worker.connect(clients)

    def call(self, role: str, method: str, *args: Any) -> Any:
        """Call a role's method."""
        if self._worker is None:
            self.build(None)
        return self._worker.call(role, method, *args)

    def readings(self) -> dict[str, Any]:
        """Timings and memory since the last reading."""
        if self._worker is None:
            return {"seconds": {}, "bytes": 0, "memory": 0, "rank": self._spec.rank}
        return self._worker.readings()


def _join(rank: int, world: int, master: tuple[str, int]) -> None:
    """Join the group's torch.distributed world through DeepSpeed."""
    import torch

    from rlhf_t2i.roles.engine import import_deepspeed

    address, port = master
    # DeepSpeed asks for all five, even where some could be derived.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR=address, MASTER_PORT=str(port))
    if address.startswith("127."):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(0)
    import_deepspeed().init_distributed("nccl" if cuda else "gloo", verbose=False)
