"""Where a run's result comes from: the checkout's commit, the devices."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def git_revision() -> str:
    """The commit of the checkout that runs; "" outside one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def device() -> str:
    """The devices of this machine, for a person."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {os.cpu_count()} cores"
