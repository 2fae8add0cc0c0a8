"""An environment on top of the running one: its own versions of a few packages, everything else shared.

For a reward whose packages clash with the core's (``Reward.pip``). The overlay is a virtual environment that reads the
running environment's site-packages after its own, so only what differs is installed: seconds and megabytes, not the
minutes and gigabytes of a second copy of torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils import files


def overlay_python(packages: Sequence[str], cache: Path | None = None) -> Path:
    """The interpreter of the overlay with these packages; built on first use, then reused.

    Args:
        packages: pip requirements: ``name==version``, paths of wheels, or pip options (``--no-index``).
        cache: Folder of the overlays; ``~/.cache/rlhf-t2i/environments`` when None.

    Raises:
        UsageError: pip cannot install the packages; its last line says why.
    """
    cache = cache or files.expanded(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "rlhf-t2i" / "environments"
    identity = "\0".join([sys.prefix, sys.version, *packages])
    folder = cache / hashlib.sha256(identity.encode()).hexdigest()[:16]
    python = folder / "bin" / "python"
    if not folder.exists():
        # Built beside and renamed: two processes, or a kill half-way, never leave half an environment behind.
        building = cache / f"{folder.name}.{os.getpid()}"
        shutil.rmtree(building, ignore_errors=True)
        try:
            create_overlay(building)
            install(building / "bin" / "python", packages)
            building.rename(folder)
        except OSError as error:
            if not folder.exists():  # else another process has built it meanwhile
                raise UsageError(
                    f"the environment with {', '.join(packages)} cannot be made in {cache}: {error.strerror}"
                ) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return python


def create_overlay(folder: Path) -> Path:
    """A virtual environment that sees the running environment's packages behind its own; returns its interpreter."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    own = next((folder / "lib").glob("python*")) / "site-packages"
    # addsitedir, not a plain path: editable installs are .pth files, which a plain path would not read.
    lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    (own / "rlhf_t2i_core.pth").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / "bin" / "python"


def install(python: Path, packages: Sequence[str]) -> None:
    """Install packages into the environment of ``python`` with the running environment's pip."""
    command = [sys.executable, "-P", "-m", "pip", "--python", str(python), "install", "--quiet", *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip exit code {done.returncode}"
        raise UsageError(f"the environment with {', '.join(packages)} cannot be made: {reason}")
