"""A run over a Ray whose object store and disk fill up; prints how it ended, and what happened on stderr.

``python -m tests.training.full_store RECIPE OUT``. The disk counts as full from the beginning
(``local_fs_capacity_threshold``), and Ray does not spill: it would once, before it looks at the disk.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
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
    """Fills the store after the second step, and from then on takes what room there is, until :meth:`stop`."""

    def __init__(self) -> None:
        self._thread, self._ended = threading.Thread(target=self._fill), threading.Event()

    def on_phase(self, name: str) -> None:
        print(f"{time.monotonic() - STARTED:.0f} s: {name}", file=sys.stderr, flush=True)

    on_message = on_phase

    def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        self.on_phase(f"step {state.step}")
        if state.step == 2:
            self._thread.start()

    def stop(self) -> None:
        """Before Ray ends: a ``put`` would start another one."""
        self._ended.set()
        self._thread.join()

    def _fill(self) -> None:
        """Large pieces first; then small ones without end, or a step could use what another has freed."""
        held = []
        for size in (2**20, 2**16, 2**13):
            full = False
            while not (self._ended.is_set() or (full and size > 2**13)):
                try:
                    held.append(ray.put(np.zeros(size, np.uint8)))
                except ray.exceptions.OutOfDiskError:
                    full = True
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
    filler = Filler()
    try:
        run.run(reading.load(recipe, changes), out, callback=filler)
    except RunError as error:
        filler.on_phase("ended")
        print(f"ended: {error}", flush=True)
    filler.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
