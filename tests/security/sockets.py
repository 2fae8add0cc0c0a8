"""Start Ray as a local run does, with a torch.distributed world of two, and print every socket that listens."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import psutil
import ray  # imported before the run's own code, as a plugin might

from rlhf_t2i.cluster.actor import CONCURRENCY, WorkerActor, join_group
from rlhf_t2i.cluster.connect import start_local_ray, stop
from tests.limits import HANG_S


class Peer(WorkerActor):
    """A process of a trained group without its networks."""

    def join(self, master: tuple[str, int]) -> float:
        """Join the group's world and sum a one over its ranks."""
        import torch

        join_group(self._spec.rank, self._spec.world, master, timedelta(seconds=HANG_S))
        one = torch.ones(1)
        torch.distributed.all_reduce(one)
        return float(one)


def listening() -> list[list[Any]]:
    """Process name, address and port of each listening socket of this process and its descendants."""
    own, found = psutil.Process(), list[list[Any]]()
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # an idle one that Ray has just ended
            found += [
                [process.name(), connection.laddr.ip, connection.laddr.port]
                for connection in process.net_connections(kind="inet")
                if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)  # TCP that listens, UDP
            ]
    return found


def main() -> None:
    """Print what there is as one line of JSON."""
    from ray._common.usage.usage_lib import usage_stats_enabled

    start_local_ray(2)
    actor = ray.remote(concurrency_groups=CONCURRENCY)(Peer)
    peers = [actor.remote(SimpleNamespace(rank=rank, world=2, threads=1)) for rank in range(2)]
    master = ray.get(peers[0].rendezvous.remote())
    sums = ray.get([peer.join.remote(master) for peer in peers])
    found = {
        "sums": sums,
        "master": master,
        "sockets": listening(),
        "dashboard": ray._private.worker._global_node.webui_url or "",
        "usage_stats": usage_stats_enabled(),
        "token": os.environ.get("RAY_AUTH_MODE") == "token",
    }
    stop()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
