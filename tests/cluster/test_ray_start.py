"""The Ray that a run starts: private files, short sockets, quiet; no code of the working folder runs in it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from rlhf_t2i.cluster import connect, ray_folder
from rlhf_t2i.errors import RunError, Stopped
from tests.limits import HANG_S

# Started as the installed command is: the working folder is not on the import path of this process.
SCRIPT = """
import contextlib, json, os, sys, time
from pathlib import Path
import numpy as np, psutil, ray
from ray._private import worker as ray_worker
from rlhf_t2i.cluster import connect
from rlhf_t2i.cluster.control import RayMonitor
from tests.limits import HANG_S

connect.start_local_ray(2)
connect.keep_messages(Path("ray.log"))
folder, monitor = connect._own[0], RayMonitor.of_own_ray()

@ray.remote
def worker():
    import statistics
    return statistics.__file__, sys.path, os.getcwd()

kept = [ray.put(np.zeros(2**20)) for _ in range(3)]
module, path, cwd = ray.get(worker.remote())
sockets, groups = [], []
for process in psutil.Process().children(recursive=True):
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # an idle one that Ray has just ended
        sockets += [c.laddr for c in process.net_connections("unix") if c.laddr]
        groups.append(os.getpgid(process.pid))
facts = {
    "module": module, "path": path, "cwd": cwd, "ray": str(folder.ray), "spill": str(folder.spill),
    "mode": [os.stat(f.parent).st_mode & 0o777 for f in (folder.ray, folder.spill)],
    "sockets": [s for s in sockets if "plasma_store" in s],
    "group": os.getpgid(0),
    "groups": groups,
    "store": [str(monitor.store.folder), monitor.store.size, 512 * monitor.store.file.stat().st_blocks],
}
ray_worker._global_node.all_processes["raylet"][0].process.kill()
def said():
    return Path("ray.log").read_text() if Path("ray.log").exists() else ""

deadline = time.monotonic() + HANG_S
while "terminated" not in said() and time.monotonic() < deadline:
    time.sleep(0.1)
facts["said"] = said()
connect.stop()
print(json.dumps(facts))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_hostile_working_folder_and_a_long_temporary_folder(tmp_path: Path) -> None:
    working, long = tmp_path / "work", tmp_path / ("x" * 60)
    working.mkdir()
    long.mkdir()
    for name in ("statistics", "sitecustomize", "selectors"):
        (working / f"{name}.py").write_text("raise SystemExit('code of the working folder runs')\n", "utf-8")
    (tmp_path / "start.py").write_text(SCRIPT, "utf-8")
    done = subprocess.run(
        [sys.executable, tmp_path / "start.py"], cwd=working, env=os.environ | {"TMPDIR": str(long)},
        capture_output=True, text=True, timeout=HANG_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()  # and nothing of Ray's, though its raylet was killed
    facts = json.loads(line)
    assert "Raylet is terminated" in facts["said"]
    store, size, written = facts["store"]
    assert store in ("/dev/shm", facts["ray"])
    assert size > written > 3 * 2**20 * 8
    assert not facts["module"].startswith(str(tmp_path))
    assert str(working) not in facts["path"]
    assert facts["cwd"] == str(working)  # relative paths keep their meaning
    assert facts["mode"] == [0o700, 0o700]
    assert facts["spill"].startswith(str(long))
    assert facts["sockets"]
    assert max(len(os.fsencode(socket)) for socket in facts["sockets"]) <= 107
    assert all(socket.startswith(facts["ray"]) for socket in facts["sockets"])
    assert facts["group"] not in facts["groups"]
    assert not Path(facts["ray"]).parent.exists()
    assert list(long.iterdir()) == []


def test_no_code_of_the_working_folder_runs_where_pip_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``python -m`` puts it first on the import path."""
    from rlhf_t2i.errors import UsageError
    from rlhf_t2i.plugins.environments import install

    (tmp_path / "statistics.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", "utf-8")
    (tmp_path / "pip.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="cannot be made"):
        install(Path(sys.executable), ["--no-index", "a-package-that-is-not-there"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("folder", "fits"),
    [
        ("/tmp", True), ("/tmp/a b", True), ("/scratch/job.1+2@x", True), ("/tmp/a\\b", False), ("/tmp/it's", False),
        ('/tmp/"x"', False), ("/tmp/{x}", False), ("/tmp/%s", False), ("/tmp/$HOME", False), ("/tmp/a#b?c", False),
        ("/tmp/a\nb", False), ("/tmp/t\u00ebmp", False), ("/tmp/caf\udce9", False), ("/tmp/a;b", False),
        ("/tmp/a*", False), ("/tmp/" + "x" * 60, False),
    ],
)  # fmt: skip
def test_rays_folder_is_only_where_ray_can_use_it(folder: str, fits: bool) -> None:
    """Cases E.2: elsewhere it is in /tmp, and TMPDIR has the spilled objects alone."""
    assert ray_folder.fits(Path(folder)) is fits


@pytest.mark.parametrize("raised", [Exception("The current node timed out\nmore"), KeyError("x"), OSError("no")])
def test_a_ray_that_does_not_start_is_one_sentence(raised: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect.ray, "init", MagicMock(side_effect=raised))
    with pytest.raises(RunError, match=r"^Ray does not start on this machine: .+$"):
        connect.start_local_ray(1)
    connect.stop()
    monkeypatch.setattr(connect.ray, "init", MagicMock(side_effect=Stopped(15)))
    with pytest.raises(Stopped):
        connect.start_local_ray(1)
    connect.stop()


def test_folders_of_killed_runs_are_removed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_folder.tempfile, "gettempdir", lambda: "/tmp")
    old, young = (Path(ray_folder.tempfile.mkdtemp(prefix="rlhf-t2i-", dir="/tmp")) for _ in range(2))
    mine = ray_folder.RayFolder()
    try:
        for folder in (old, mine.ray.parent):
            os.utime(folder, (0, 0))
        other = ray_folder.RayFolder()
        other.remove()
        assert not old.exists()
        assert young.exists()  # somebody may still want to read its logs
        assert mine.ray.parent.exists()  # locked
        assert stat.S_IMODE(mine.ray.parent.stat().st_mode) == 0o700
    finally:
        young.rmdir()
        mine.remove()
    assert not mine.ray.parent.exists()
