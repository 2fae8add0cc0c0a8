"""A Ray cluster of several nodes on one machine, whose nodes can be killed whole."""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import Any

import psutil


class Nodes:
    """A head without CPUs, so that no role is placed on it, and nodes of one CPU each.

    Args:
        count: Nodes besides the head; at least one more than the processes of a run, or a lost one has no spare.
    """

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self._raylets: dict[int, Any] = {}
        for _ in range(count):
            self._add()

    @property
    def address(self) -> str:
        """For ``--address``."""
        return str(self._cluster.address)

    def _add(self) -> None:
        node = self._cluster.add_node(num_cpus=1)
        self._raylets[raylet_of(node)] = node

    def processes(self) -> list[psutil.Process]:
        """All that run on the nodes."""
        found: list[psutil.Process] = []
        for raylet in self._raylets:
            with suppress(psutil.NoSuchProcess):
                found += psutil.Process(raylet).children(recursive=True)
        return found

    def kill_under(self, process: psutil.Process) -> bool:
        """SIGKILL the node on which an actor runs, all its processes at once, and start another in its place.

        Returns:
            False where the process has ended by itself meanwhile.
        """
        try:
            raylet = next(parent for parent in process.parents() if parent.pid in self._raylets)
        except (psutil.Error, StopIteration):
            return False
        kill_node(self._cluster, self._raylets.pop(raylet.pid))
        self._add()
        return True

    def close(self) -> None:
        """End the cluster."""
        self._cluster.shutdown()


def raylet_of(node: Any) -> int:
    """The process id of a node's raylet."""
    return int(node.all_processes["raylet"][0].process.pid)


def kill_node(cluster: Any, node: Any) -> None:
    """SIGKILL a node's raylet and everything below it, as a machine that loses power does."""
    raylet = psutil.Process(raylet_of(node))
    for process in [raylet, *raylet.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # it ends by itself when its raylet does
            process.send_signal(signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)  # what else belongs to it
