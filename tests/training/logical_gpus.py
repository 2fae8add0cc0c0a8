"""Placements over GPUs that only Ray believes in: it hands them out, the processes compute on the CPU.

``python -m tests.training.logical_gpus RECIPE OUT`` prints a line of JSON: how each placement ended, by name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ray

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe import reading
from rlhf_t2i.training import run

TWO = "train: {roles: [learner, generator], threads: 1}, rest: {roles: [assistant, reference, reward], threads: 1}"
RANKS = "all: {roles: [learner, generator, assistant, reference, reward], devices: 2, threads: 1}"
PLACEMENTS = {
    "two groups on one GPU": f"{{share_devices: true, groups: {{{TWO}}}}}",
    "two groups, not shared": f"{{groups: {{{TWO}}}}}",
    "two ranks on one GPU": f"{{share_devices: true, groups: {{{RANKS}}}}}",
}


def main(recipe: Path, out: Path) -> None:
    """Run them all."""
    ray.init(
        "local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False
    )  # fmt: skip
    ended = {}
    for name, placement in PLACEMENTS.items():
        try:
            run.run(reading.load(recipe, [f"placement={placement}"]), out / name)
            ended[name] = "done"
        except UsageError as error:
            ended[name] = str(error)
    print(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
