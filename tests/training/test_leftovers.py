"""However a run over Ray ends, no process, listening port or file in shared memory stays."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_t2i.recipe.schema import Recipe
from tests.training.endings import ENDINGS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("real_processes")]

EXPECTED = {"done": "done", "failed": "RewardFailure", "SIGTERM to the group": "Stopped", "second Ctrl-C": "Stopped"}
# When the driver is killed they try to tell Ray's control store for a minute, a limit fixed in Ray's code; make chaos
# sees to it that they end then.
AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}

LOOKS, PAUSE_S = 200, 0.1
"""Less than a minute: agents that nobody ends would be seen. On a slow machine a look takes longer, too."""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="looks at Linux's shared memory")
def test_nothing_is_left_of_a_run_however_it_ends(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    make_recipe()
    shared = set(Path("/dev/shm").iterdir())
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.training.endings", str(tmp_path / "recipe.yaml"), str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        start_new_session=True, env=os.environ | {"TMPDIR": str(temporary)},
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    processes: set[psutil.Process] = set()
    try:
        for how in ENDINGS:
            started = [Started.find(*facts) for facts in json.loads(child.stdout.readline())["started"]]
            processes |= {one.process for one in started if one.process is not None}
            assert {"raylet", "gcs_server"} <= {one.name for one in started if one.ports}
            ended = child.stdout.readline()
            assert how == "SIGKILL" if ended == "" else json.loads(ended)["ended"] == EXPECTED[how], (how, ended)
            expected = [one for one in started if how != "SIGKILL" or one.name not in AGENTS]
            for _ in range(LOOKS):
                rest = left(expected, shared, temporary)
                if not rest:
                    break
                time.sleep(PAUSE_S)
            assert rest == [], how
            folders = list(temporary.glob("rlhf-t2i-*"))
            assert len(folders) == (how == "SIGKILL"), how
            assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)
            if how == "done":
                assert "Ray's own process gcs_server died; starting again" in json.loads(ended)["told"]
            if how == "SIGTERM to the group":
                assert "checkpoint" in json.loads(ended)["told"]
            if how != "SIGKILL":
                child.stdin.write("\n")
                child.stdin.flush()
    finally:
        child.kill()
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # compares its start, too: a number may be another process's by now
                process.kill()
        child.wait()
        shutil.rmtree(temporary, ignore_errors=True)  # of killed processes that are not gone yet


@dataclass
class Started:
    """A process of a run."""

    process: psutil.Process | None
    name: str
    ports: list[int]

    @classmethod
    def find(cls, pid: int, created: float, name: str, ports: list[int]) -> Started:
        """It may have ended meanwhile, and another may have its number."""
        try:
            process = psutil.Process(pid)
        except psutil.NoSuchProcess:
            return cls(None, name, ports)
        return cls(process if process.create_time() == created else None, name, ports)

    def runs(self) -> bool:
        """One that ended and that nobody has waited for does not."""
        try:
            return self.process is not None and self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def left(started: list[Started], shared: set[Path], temporary: Path) -> list[Any]:
    """Processes, ports and files in shared memory that are still there.

    Other tests run beside this one. A port counts while one of this run's processes listens on it, as its TMPDIR shows;
    a file unless a process of another run holds it.
    """
    ports = {port for one in started for port in one.ports}
    open_now = {
        c.laddr.port: c.pid
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port in ports
    }
    return [
        *[one.name for one in started if one.runs()],
        *sorted(port for port, pid in open_now.items() if pid is None or of_this_run(pid, temporary)),
        *sorted(str(path) for path in set(Path("/dev/shm").iterdir()) - shared if not held_elsewhere(path, temporary)),
    ]


def of_this_run(pid: int, temporary: Path) -> bool:
    """Whether a process was started with this folder for temporary files."""
    try:
        return psutil.Process(pid).environ().get("TMPDIR") == str(temporary)
    except psutil.NoSuchProcess:
        return False


def held_elsewhere(path: Path, temporary: Path) -> bool:
    """Whether a process that is not of this run has mapped a file."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            holds = str(path) in (process / "maps").read_text("utf-8", "replace")
        except OSError:
            continue
        if holds and not of_this_run(int(process.name), temporary):
            return True
    return False
