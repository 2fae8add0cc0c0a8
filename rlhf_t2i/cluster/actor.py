"""The Ray actor of one process of a group."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING

import psutil
import ray

from rlhf_t2i.errors import exit_in_plugin

if TYPE_CHECKING:
    from ray import ObjectRef
    from torch.distributed import TCPStore

    from rlhf_t2i.cluster.clients import RemoteClient
    from rlhf_t2i.roles.packing import Packed
    from rlhf_t2i.roles.worker import Reading, Worker, WorkerSpec

_TIMEOUT_MARGIN_S = 60.0
CONCURRENCY = {"watch": 1, "disk": 1}
"""Threads of an actor beside the one that works: the groups that its methods name."""


class WorkerActor:
    """Builds its roles on request (trained ones need their peers' address first) and answers calls.

    A process without trained roles keeps nothing between calls but the generator's weights, so Ray may restart it and
    repeat the call: the first call after a restart rebuilds the roles with the weights that the :class:`WeightStore`
    named ``weight_store`` holds.
    """

    def __init__(self, spec: WorkerSpec, weight_store: str | None = None) -> None:
        from rlhf_t2i.roles.worker import fair_threads, set_threads

        self._spec, self._weight_store = spec, weight_store
        set_threads(spec.threads or fair_threads(spec.neighbors))
        self._built: Worker | None = None
        self._store: TCPStore | None = None  # kept alive for as long as the process lives
        self._call, self._since = "starting", time.monotonic()

    def rendezvous(self) -> tuple[str, int]:
        """Open the store through which the group's processes find each other; its address and port.

        It listens on the interface that Ray uses; torch's default is every interface.
        """
        from torch.distributed import TCPStore

        address = ray.util.get_node_ip_address()
        listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        listener.bind((address, 0))
        listener.listen()
        port = int(listener.getsockname()[1])
        self._store = TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        return address, port

    def build(self, master: tuple[str, int] | None) -> str:
        """Load the roles; with ``master``, join the group's process group first. Returns the device's name."""
        from rlhf_t2i.cluster.isolated import start_isolated
        from rlhf_t2i.roles.worker import Worker

        # The controller's own limit comes first: it says what every process was doing.
        timeout = timedelta(seconds=self._spec.recipe.placement.step_timeout_s + _TIMEOUT_MARGIN_S)
        if master is not None:
            join_group(self._spec.rank, self._spec.world, master, timeout)
        self._built = Worker(self._spec, start_isolated)
        if master is not None:
            set_collective_timeout(timeout)
        return str(self._built.device)

    def connect(self, clients: dict[str, list[RemoteClient]]) -> None:
        """Tell the trained roles where the others are; answers are moved to this process's device."""
        for client in chain(*clients.values()):
            client.device = self._worker.device
        self._worker.connect(clients)

    @property
    def _worker(self) -> Worker:
        assert self._built is not None, "build() comes first"
        return self._built

    def call(self, role: str, method: str, *args: object) -> object:
        """Call a role's method by its name."""
        self._call, self._since = f"{role}.{method}", time.monotonic()
        try:
            if self._built is None:
                self._rebuild()
            return self._worker.call(role, getattr(type(self._worker.roles[role]), method), *args)
        except SystemExit as error:  # of a plugin: Ray would end the process as if it had asked to
            raise exit_in_plugin(error) from None
        finally:
            self._call, self._since = "idle", time.monotonic()

    def _rebuild(self) -> None:
        """After a restart: the roles, and the newest weights of the generator."""
        from rlhf_t2i.roles.generator import GeneratorRole

        self.build(None)
        if self._weight_store is not None:
            weight_store = ray.get_actor(self._weight_store)
            for name, parts in ray.get(weight_store.newest.remote()).items():
                for packed in parts:
                    self._worker.call("generator", GeneratorRole.load, name, ray.get(packed))

    @ray.method(concurrency_group="watch")
    def status(self) -> str:
        """What this process does, and for how long; answered in a thread of its own, also during a call."""
        from rlhf_t2i.roles.stopwatch import stopwatch

        waiting = ", waiting for another process" if stopwatch.waiting() else ""
        return f"{self._call} for {time.monotonic() - self._since:.0f} s{waiting}"

    @ray.method(concurrency_group="disk")
    def finish_saving(self, role: str) -> None:
        """Wait until a trained role's state is written; in a thread of its own, while the role goes on training."""
        from rlhf_t2i.roles.trained import TrainedRole

        trained = self._worker.roles[role]
        assert isinstance(trained, TrainedRole)
        trained.finish_saving()

    def reading(self) -> Reading:
        """What this process has measured since its last reading; nothing after a restart."""
        from rlhf_t2i.roles.worker import Reading

        return Reading() if self._built is None else self._built.reading()


class WeightStore:
    """Holds the newest weights of a generator in a group of its own, for its process after a restart."""

    def __init__(self) -> None:
        self._newest: dict[str, list[ObjectRef[Packed]]] = {}

    def keep(self, name: str, parts: list[ObjectRef[Packed]]) -> None:
        """Remember references to weights, which may still be on their way; in a list, for Ray would fetch bare ones."""
        self._newest[name] = parts

    def newest(self) -> dict[str, list[ObjectRef[Packed]]]:
        """References by name."""
        return self._newest


def network_interface(address: str) -> str | None:
    """The interface of this machine that holds an address, as ``lo`` does 127.0.0.1."""
    for name, held in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in held):
            return name
    return None


def join_group(rank: int, world: int, master: tuple[str, int], timeout: timedelta) -> None:
    """Join the group's torch.distributed world through DeepSpeed; ``timeout`` is that of its collectives."""
    import torch

    from rlhf_t2i.engines.deepspeed import import_deepspeed

    address, port = master
    # DeepSpeed asks for all five, even where some could be derived.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR=address, MASTER_PORT=str(port))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # every rank joins the store that rendezvous() opened
    interface = network_interface(ray.util.get_node_ip_address())
    if interface is not None:
        # By default gloo uses the address of the machine's name: on Debian 127.0.1.1, which no other machine reaches.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(0)
    import_deepspeed().init_distributed("nccl" if cuda else "gloo", verbose=False, timeout=timeout)


def set_collective_timeout(timeout: timedelta) -> None:
    """Set the timeout of every process group, also of those that DeepSpeed makes with torch's default of 10 minutes."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)
