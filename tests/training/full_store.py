"""A run over a Ray whose object store and disk fill up; prints how it ended, and what happened on stderr.

``python -m tests.training.full_store RECIPE OUT``. The disk counts as full from the beginning
(``local_fs_capacity_threshold``), and Ray does not spill: it would once, before it looks at the disk.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rlhf_t2i.errors import RunError
from rlhf_t2i.recipe import reading
from rlhf_t2i.training import run
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.state import TrainState
from tests.limits import HANG_S

STARTED = time.monotonic()
STORE = 80 * 2**20  # Ray takes no less than 75 MiB
GROUPS = "{train: {roles: [learner], threads: 1}, rest: {roles: [generator, assistant, reward, reference], threads: 1}}"


class Filler(TrainCallback):
    """Fills the store after the second step; from then on it takes what room there is, until :meth:`stop`."""

    def __init__(self) -> None:
        self._held: list[ray.ObjectRef] = []
        self._pool, self._ended = ThreadPoolExecutor(1), threading.Event()
        self._rest: Future[None] | None = None

    def on_phase(self, name: str) -> None:
        print(f"{time.monotonic() - STARTED:.0f} s: {name}", file=sys.stderr, flush=True)

    on_message = on_phase

    def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        self.on_phase(f"step {state.step}")
        if state.step == 2:
            for size in (2**20, 2**16, 2**13):
                while self._put(size):
                    pass
            self._rest = self._pool.submit(self._take_the_rest)

    def stop(self) -> None:
        """Before Ray ends: a ``put`` would start another one. Raises what the thread raised."""
        self._ended.set()
        if self._rest is not None:
            self._rest.result()

    def _put(self, size: int) -> bool:
        """Whether there was room for a piece."""
        try:
            self._held.append(ray.put(np.zeros(size, np.uint8)))
        except ray.exceptions.OutOfDiskError:
            return False
        return True

    def _take_the_rest(self) -> None:
        """Small pieces without end, or a step could use what another has freed."""
        while not self._ended.is_set():
            if not self._put(2**13):
                time.sleep(0.001)


def main(recipe: Path, out: Path) -> None:
    """Run until it ends."""
    faulthandler.dump_traceback_later(HANG_S - 60, exit=True)  # every thread's stack, before the test gives up
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
        object_store_memory=STORE,
        _system_config={"local_fs_capacity_threshold": 0.0, "automatic_object_spilling_enabled": False},
    )  # fmt: skip
    changes = [
        f"placement={{mode: ray, step_timeout_s: 900, max_restarts: 0, groups: {GROUPS}}}",
        "steps=200",
        "checkpoints.every=1",
    ]
    filler, ended = Filler(), "without an error"
    try:
        run.run(reading.load(recipe, changes), out, callback=filler)
    except RunError as error:
        ended = str(error)
    finally:
        filler.on_phase("ended")
        filler.stop()
    print(f"ended: {ended}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
