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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_t2i.recipe.schema import Recipe
from tests.training.endings import ENDINGS

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EXPECTED = {"done": "done", "failed": "RewardFailure", "SIGTERM to the group": "Stopped", "second Ctrl-C": "Stopped"}
# When the driver is killed they try to tell Ray's control store for a minute, a limit fixed in Ray's code; make chaos
# sees to it that they end then.
AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}

PATIENCE_S = 20.0


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
            deadline = time.monotonic() + PATIENCE_S
            while (rest := left(expected, shared)) and time.monotonic() < deadline:
                time.sleep(0.1)
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
        for process in [psutil.Process(child.pid), *processes]:
            if process.is_running():  # compares its start, too: a number may be another process's by now
                process.kill()
        child.wait()
        shutil.rmtree(temporary)


@dataclass
class Started:
    """A process of a run."""

    process: psutil.Process | None
    name: str
    ports: list[int]

    @classmethod
    def find(cls, pid: int, name: str, ports: list[int]) -> Started:
        """It may have ended meanwhile."""
        return cls(psutil.Process(pid) if psutil.pid_exists(pid) else None, name, ports)

    def runs(self) -> bool:
        """One that ended and that nobody has waited for does not."""
        try:
            return self.process is not None and self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def left(started: list[Started], shared: set[Path]) -> list[Any]:
    """Processes, ports and files in shared memory that are still there."""
    open_now = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    ports = {port for one in started for port in one.ports}
    return [
        *[one.name for one in started if one.runs()],
        *sorted(ports & open_now),
        *sorted(set(Path("/dev/shm").iterdir()) - shared),
    ]
