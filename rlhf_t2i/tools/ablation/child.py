"""Run a command that ends with its parent: ``python -m rlhf_t2i.tools.ablation.child PARENT COMMAND...``.

An ablation that is killed with SIGKILL cannot stop its rows; on Linux the kernel does, with SIGTERM, on which a
training run writes a checkpoint. On other systems the row continues, and its lock keeps other processes away.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask for the signal, then become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            # The parent died before the request: the signal would never come.
            sys.exit(128 + signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
