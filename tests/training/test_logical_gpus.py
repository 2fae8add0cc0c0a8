"""GPUs are reserved, shared and refused as a recipe says; no GPU is needed for that."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_t2i.recipe.schema import Recipe
from tests.limits import HANG_S
from tests.training.test_run import metrics


@pytest.mark.ray
@pytest.mark.slow
def test_placements_over_one_gpu(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    make_recipe()  # writes recipe.yaml
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.logical_gpus", tmp_path / "recipe.yaml", tmp_path / "out"],
        capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout.splitlines()[-1])
    assert ended["two groups on one GPU"] == "done"
    assert len(metrics(tmp_path / "out/two groups on one GPU")) == 3
    assert ended["two groups, not shared"].startswith(
        "placement needs 2 GPUs (train: 1, rest: 1) but the cluster has 1"
    )
    assert ended["two ranks on one GPU"].startswith(
        "placement.share_devices: the 2 ranks of group 'all' train together and cannot share a GPU"
    )
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["two groups on one GPU"]  # nothing half-written
