"""Kill an evaluation at random moments, ten times, then let it finish: ``killer SETTINGS CALM_OUT KILLED_OUT``.

One process imports torch once and forks its victims, so that ten kills take seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from rlhf_t2i.evaluation.run import evaluate
from rlhf_t2i.evaluation.settings import build


def main(settings_file: str, calm: str, killed: str) -> None:
    torch.set_num_threads(1)
    settings = build(json.loads(Path(settings_file).read_text()))
    # In this process: the imports and loads it causes are then there for every child.
    evaluate(settings, Path(calm))
    start = time.monotonic()
    assert wait(spawn(settings, f"{calm}-timed")) == 0
    whole = time.monotonic() - start
    random.seed(0)
    count = 0
    while count < 10:
        victim = spawn(settings, killed)
        time.sleep(random.uniform(0, whole))
        os.kill(victim, signal.SIGKILL)
        count += wait(victim) == -signal.SIGKILL
        if (Path(killed) / "results.json").is_file():
            # It finished before the shot: take something away so that there is work left to interrupt.
            (Path(killed) / "results.json").unlink()
            for path in sorted((Path(killed) / "images").glob("*.png"))[random.randrange(10) :]:
                path.unlink()
    assert wait(spawn(settings, killed)) == 0
    print(f"{count} killed")


def spawn(settings: object, out: str) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        evaluate(settings, Path(out))  # type: ignore[arg-type]
        code = 0
    finally:
        os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
