"""Whether the file system of Ray's object store has room for the pages that the store has not used yet.

The store is a sparse file in ``/dev/shm``, or in the temporary folder if ``/dev/shm`` was too small when Ray started.
It takes a page when a process first writes to it. If the file system is full by then, that process gets SIGBUS: Ray's
raylet, a process of a role, or the driver, which would end without a message.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_MARGIN = 64 * 2**20  # what other processes may write before the next check
_MIB = 2**20


@dataclass(frozen=True)
class ObjectStore:
    """The file of the object store that a raylet holds open.

    Attributes:
        file: In ``/proc``: the store removes its name when it has opened it.
        folder: Where it is.
        size: In bytes, used or not.
    """

    file: Path
    folder: Path
    size: int

    @classmethod
    def of(cls, raylet: int) -> ObjectStore | None:
        """The store of the raylet with this process id; None on systems without ``/proc``."""
        for file in Path(f"/proc/{raylet}/fd").glob("*"):
            with suppress(OSError):
                target = file.readlink()
                if target.name.startswith("plasma") and target.name.endswith(" (deleted)"):
                    return cls(file, target.parent, file.stat().st_size)
        return None

    def shortage(self) -> str | None:
        """What is short, and what to do about it; None while there is room.

        The pages of a raylet that is dead are free again: then there is a shortage if a store like its would not fit.
        """
        try:
            status = self.file.stat()
            missing = status.st_size - 512 * status.st_blocks
            needed = min(missing, _MARGIN)
        except OSError:
            missing = needed = self.size
        free = shutil.disk_usage(self.folder).free
        if free >= needed:
            return None
        return (
            f"{self.folder} has {free // _MIB:,} MiB left, and Ray's object store there may take {missing // _MIB:,} "
            "MiB more: remove what other programs keep there, or enlarge it (docker run --shm-size)"
        )
