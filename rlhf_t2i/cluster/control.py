"""Whether Ray itself still works, and why a process was lost.

A run can outlive Ray's control store for a minute, then Ray ends the process.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from ray._private import worker

from rlhf_t2i.cluster.object_store import ObjectStore
from rlhf_t2i.errors import ProcessLost, RunError, option

_ESSENTIAL = ("gcs_server", "raylet")
_PROBE_EVERY_S, _PROBE_TIMEOUT_S = 5.0, 2.0
_HEAD_SILENT_S = 30.0  # Ray ends the process, with a line of its own, after 60
_INLINE = 50_000  # bytes; Ray sends arguments of up to 100 KiB, with their envelope, beside the object store
_KERNEL_COUNTERS = Path("/proc/vmstat")
RAY_DIED = "Ray's own process"
_OOM_KILLED = (
    "since the roles started, the kernel has killed a process of this machine for lack of memory "
    f"(oom_kill in {_KERNEL_COUNTERS}): `memory` in metrics.jsonl says which process grows"
)


@dataclass
class RayMonitor:
    """Notices that Ray's own processes are gone, or about to go.

    Attributes:
        own: Whether this run started Ray.
        head: HOST:PORT of the head of a cluster that it joined.
        store: The object store of a Ray that this run started.
    """

    own: bool = False
    head: str | None = None
    store: ObjectStore | None = None
    _oom_kills: int | None = None
    _lost: bool = False
    _probed: float = field(default_factory=time.monotonic)
    _silent_since: float | None = None

    @classmethod
    def of_own_ray(cls) -> RayMonitor:
        """For the Ray that this process has just started."""
        (raylet,) = worker._global_node.all_processes["raylet"]
        return cls(own=True, store=ObjectStore.of(raylet.process.pid))

    def __post_init__(self) -> None:
        self._oom_kills = oom_kills()

    def alive(self) -> bool:
        """Whether Ray answers now; calls to one that is gone would block for a minute."""
        if self._lost or self.own:
            return not self._lost and not self.dead()
        return self.head is None or _listens(self.head)

    def check(self, sending: int = 0) -> None:
        """Look at the processes, or now and then at the head's port.

        Args:
            sending: Bytes that this process is about to send; more than a few pass through the object store.

        Raises:
            ProcessLost: A process of the run's own Ray died, or its object store has no room for what is to be sent:
                another Ray can be started.
            RunError: The head of the cluster has not answered for 30 s.
        """
        if self.own:
            self._check_processes()
            if sending > _INLINE and self.store is not None and (shortage := self.store.shortage()) is not None:
                raise ProcessLost(shortage)
        elif self.head is not None and time.monotonic() - self._probed > _PROBE_EVERY_S:
            self._probe(self.head)

    def dead(self) -> list[str]:
        """Which processes of the run's own Ray died."""
        node = worker._global_node if self.own else None  # also None once it was stopped
        return [] if node is None else [kind for kind, _ in node.dead_processes() if kind in _ESSENTIAL]

    def _check_processes(self) -> None:
        dead = self.dead()
        if dead:
            self._lost = True
            raise self.explain(ProcessLost(f"{RAY_DIED} {dead[0]} died"))

    def explain(self, lost: ProcessLost) -> ProcessLost:
        """The error, with its likely cause: Ray itself died, shared memory is full, or the kernel counted a kill.

        Without Ray's own processes every call fails, whatever Ray says of it.
        """
        text = str(lost)
        if RAY_DIED not in text and (dead := self.dead()):
            text = f"{RAY_DIED} {dead[0]} died"
        if self.store is not None and (shortage := self.store.shortage()) is not None:
            return ProcessLost(text if str(self.store.folder) in text else f"{text}; {shortage}")
        killed = self.head is None and self._oom_kills is not None and (oom_kills() or 0) > self._oom_kills
        if killed and _OOM_KILLED not in text:
            text += f"; {_OOM_KILLED}"
        return ProcessLost(text)

    def _probe(self, head: str) -> None:
        self._probed = time.monotonic()
        if _listens(head):
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = self._probed
        elif self._probed - self._silent_since > _HEAD_SILENT_S:
            self._lost = True
            raise RunError(
                f"the head node of the Ray cluster at {head} has not answered for {_HEAD_SILENT_S:g} s: start the "
                f"cluster again, then continue with {option('resume')}"
            )


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def oom_kills() -> int | None:
    """How many processes the kernel has killed for lack of memory, in all cgroups; None where it does not say."""
    try:
        lines = _KERNEL_COUNTERS.read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
