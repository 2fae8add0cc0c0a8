"""Whether Ray itself still works: a run can outlive its control store for a minute, then Ray ends the process."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field

from ray._private import worker

from rlhf_t2i.errors import ProcessLost, RunError, option

_ESSENTIAL = ("gcs_server", "raylet")
_PROBE_EVERY_S, _PROBE_TIMEOUT_S = 5.0, 2.0
_HEAD_SILENT_S = 30.0  # Ray ends the process, with a line of its own, after 60


@dataclass
class RayMonitor:
    """Notices that Ray's own processes are gone.

    Attributes:
        own: Whether this run started Ray.
        head: HOST:PORT of the head of a cluster that it joined.
    """

    own: bool = False
    head: str | None = None
    _lost: bool = False
    _probed: float = field(default_factory=time.monotonic)
    _silent_since: float | None = None

    def alive(self) -> bool:
        """Whether Ray answers now; calls to one that is gone would block for a minute."""
        if self._lost or self.own:
            return not self._lost and not self._dead()
        return self.head is None or _listens(self.head)

    def check(self) -> None:
        """Look at the processes, or now and then at the head's port.

        Raises:
            ProcessLost: A process of the run's own Ray died: another Ray can be started.
            RunError: The head of the cluster has not answered for 30 s.
        """
        if self.own:
            self._check_processes()
        elif self.head is not None and time.monotonic() - self._probed > _PROBE_EVERY_S:
            self._probe(self.head)

    def _dead(self) -> list[str]:
        node = worker._global_node  # None once it was stopped
        return [] if node is None else [kind for kind, _ in node.dead_processes() if kind in _ESSENTIAL]

    def _check_processes(self) -> None:
        dead = self._dead()
        if dead:
            self._lost = True
            raise ProcessLost(f"Ray's own process {dead[0]} died")

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
