"""Runs over Ray in one process, each of which ends in another way; the last one kills this process.

It must lead a process group of its own.

``python -m tests.training.endings RECIPE FOLDER``. For each it prints one line of JSON with what it has started, one
with how it ended, and waits for a line on its standard input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from rlhf_t2i.errors import RunError, Stopped
from rlhf_t2i.recipe import reading
from rlhf_t2i.training import run
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.state import TrainState

GROUPS = "{all: {threads: 1, roles: [learner, generator, assistant, reference, reward]}}"
BAD_REWARD = """
from rlhf_t2i.plugins import Reward

class Bad(Reward):
    def score(self, images, prompts):
        raise ValueError("a reward that fails")
"""


class Watcher(TrainCallback):
    """Tells which processes and ports the run has, and does something after its first step."""

    def __init__(self, after_step: Callable[[], None] = lambda: None) -> None:
        self._after_step, self._told, self.restarts = after_step, False, list[str]()

    def on_phase(self, text: str) -> None:
        if self._told or not text.startswith("measuring"):
            return
        self._told = True
        started = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                started.append([process.pid, process.create_time(), process.name(), listening(process)])
        say(started=started)

    def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        if state.step == 1 and not self.restarts:
            self._after_step()

    def on_message(self, text: str) -> None:
        if text.startswith("SIGINT"):  # the first Ctrl-C has been taken; only now: two at once would count as one
            os.kill(os.getpid(), signal.SIGINT)
        if "(restart " in text:
            self.restarts.append(text)


def listening(process: psutil.Process) -> list[int]:
    """The TCP ports a process listens on."""
    return [c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]


def say(**facts: Any) -> None:
    """One line for the test."""
    print(json.dumps(facts), flush=True)


def send(number: int, to: Callable[[int, int], None] = os.kill) -> None:
    """A signal to this process or its group, a moment from now: in the middle of a step."""
    threading.Timer(0.1, to, (os.getpid(), number)).start()


def kill_control() -> None:
    """SIGKILL Ray's control store: the run starts another Ray."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name() == "gcs_server":
                process.kill()
                process.wait()


ENDINGS: dict[str, Callable[[], None]] = {
    "done": kill_control,
    "failed": lambda: None,
    "SIGTERM to the group": lambda: send(signal.SIGTERM, os.killpg),  # as Slurm and systemd send it
    "second Ctrl-C": lambda: send(signal.SIGINT),
    "SIGKILL": lambda: send(signal.SIGKILL),
}


def main(recipe: Path, out: Path) -> None:
    """All endings, one after another."""
    plugin = out / "bad.py"
    plugin.write_text(BAD_REWARD, "utf-8")
    for how, after_step in ENDINGS.items():
        changes = [f"placement={{mode: ray, groups: {GROUPS}}}", f"steps={2 if how == 'done' else 100000}"]
        if how == "failed":
            changes.append(f"algorithm.rewards=[{{name: '{plugin}:Bad', label: bad}}]")
        ended, told, watcher = "done", "", Watcher(after_step)
        try:
            run.run(reading.load(recipe, changes), out / how.replace(" ", "_"), callback=watcher)
            told = " ".join(watcher.restarts)
        except (RunError, Stopped) as error:
            ended, told = type(error).__name__, str(error)
        say(ended=ended, told=told)
        sys.stdin.readline()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
