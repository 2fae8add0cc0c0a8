"""The folder of a Ray that a run starts: its sockets, logs and spilled objects."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX, _LOCK = "rlhf-t2i-", "lock"
_SOCKET_BYTES = 107  # the longest path of a Unix socket
_INSIDE = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.12"
_PLAIN = re.compile(r"[A-Za-z0-9_./ +=@:,~-]+")
_STALE_S = 3600.0


class RayFolder:
    """Private folders (mode 0700) for one Ray, removed by :meth:`remove`.

    Ray's default, a folder named ``ray`` in the temporary folder, is writable by everybody, and so is every folder that
    it is given: it gets one inside. Slurm's temporary folders are too long for the paths of sockets: then, and where a
    path holds characters that Ray does not take, only spilled objects go there.

    Attributes:
        ray: For sockets and logs.
        spill: For objects that do not fit into shared memory, in ``TMPDIR``.

    Raises:
        OSError: No temporary folder can be written.
    """

    def __init__(self) -> None:
        temporary = Path(tempfile.gettempdir())
        private = self._make([temporary, Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")])
        self._lock = FileLock(private / _LOCK)  # held as long as this process lives
        self._lock.acquire()
        roomy = private if private.parent == temporary else Path(tempfile.mkdtemp(prefix=_PREFIX))
        self.ray, self.spill = private / "ray", roomy / "spill"

    @staticmethod
    def _make(parents: list[Path]) -> Path:
        problem: OSError | None = None
        for parent in parents:
            if not fits(parent):
                continue
            _remove_stale(parent)
            try:
                return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            except OSError as error:
                problem = problem or error
        raise problem or OSError(f"no temporary folder has a path that is short and plain enough for Ray: {parents[0]}")

    def remove(self) -> None:
        """Remove both folders."""
        for folder in (self.ray, self.spill):
            shutil.rmtree(folder.parent, ignore_errors=True)
        self._lock.release()


def fits(parent: Path) -> bool:
    """Whether Ray's sockets and logs can be in a folder below ``parent``: short enough, and of plain characters.

    With a backslash in the path Ray's raylet does not start, and Ray says after a while that the node timed out.
    """
    return (
        _PLAIN.fullmatch(str(parent)) is not None
        and len(os.fsencode(parent / f"{_PREFIX}12345678")) + len(_INSIDE) <= _SOCKET_BYTES
    )


def _remove_stale(parent: Path) -> None:
    """Remove this user's folders of runs that were killed, one hour after the last change."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, Timeout):
            status = folder.lstat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > _STALE_S:
                with FileLock(folder / _LOCK, timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)
