"""Ray's object store and the disk it spills to are full: the run ends, says so, and can be resumed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import checkpoints
from tests.limits import HANG_S

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("real_processes")]


def test_a_full_store_ends_the_run_in_a_sentence(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """In a process of its own: the store's size is chosen when Ray starts."""
    make_recipe()
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.full_store", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-9000:]
    sys.stderr.write(done.stderr)
    assert "Traceback" not in done.stderr
    (ended,) = [line for line in done.stdout.splitlines() if line.startswith("ended: ")]
    assert "object store is full" in ended, done.stderr
    saved, progress, damaged = checkpoints.find(tmp_path / "out")
    assert saved is not None
    assert progress.step >= 2
    assert damaged == []
