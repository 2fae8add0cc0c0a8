"""Forks that stand for Ray's Python processes in these tests."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests import forks
from tests.limits import HANG_S

TELLS = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ["FACT"], "NOT_THERE" in os.environ, sorted(sys.modules)]))
print("aside", file=sys.stderr)
sys.exit(7)
"""

WAITS = """
import os, time
open({path!r}, "w").write(f"{{os.getpid()}}.")
time.sleep(3600)
"""


def ask(path: Path, *arguments: str) -> list[str]:
    """The command that has a fork run a file."""
    command = forks.hook(None)["py_executable"]
    assert isinstance(command, str)
    return [*command.split(), str(path), *arguments]


def test_a_fork_is_told_everything_and_its_exit_code_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tells.py"
    path.write_text(TELLS, "utf-8")
    monkeypatch.setenv("NOT_THERE", "")
    command = ask(path, "one", "two words")
    monkeypatch.delenv("NOT_THERE")
    monkeypatch.setenv("FACT", "a b=c")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 7
    assert done.stderr == "aside\n"
    arguments, folder, fact, leaked, modules = json.loads(done.stdout)
    assert (arguments, folder, fact, leaked) == (["one", "two words"], str(tmp_path), "a b=c", False)
    assert {"torch", "diffusers", "rlhf_t2i.roles.worker"} <= set(modules)
    assert "ray" not in modules  # it would have read another run's environment


def test_a_fork_ends_with_the_process_that_asked_for_it(tmp_path: Path) -> None:
    path, told = tmp_path / "waits.py", tmp_path / "pid"
    path.write_text(WAITS.format(path=str(told)), "utf-8")
    asking = subprocess.Popen(ask(path), cwd=tmp_path)
    while not (told.is_file() and told.read_text().endswith(".")):
        time.sleep(0.01)
    fork = psutil.Process(int(told.read_text()[:-1]))
    asking.kill()
    asking.wait()
    psutil.wait_procs([fork], timeout=HANG_S)
    assert not fork.is_running()


def test_what_fails_in_a_fork_is_said_on_its_own_streams(tmp_path: Path) -> None:
    path = tmp_path / "fails.py"
    path.write_text("raise ValueError('nothing works')", "utf-8")
    done = subprocess.run(ask(path), capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 1
    assert "ValueError: nothing works" in done.stderr
