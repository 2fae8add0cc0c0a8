"""Run a command that ends with its parent: ``python -m rlhf_t2i.tools.ablation.child PARENT COMMAND...``.

An ablation that is killed with SIGKILL cannot stop its rows; the kernel does it instead, with SIGTERM, on which a
training run writes a checkpoint. Elsewhere than on Linux the row runs on, and its lock keeps others away.
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
            # It died before the request: nobody would send the signal any more.
            sys.exit(128 + signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
