"""An exported student's folder, and settings for its evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_t2i.evaluation.settings import Settings, build
from tests import tiny

REWARDS = Path(__file__).with_name("rewards.py")
BRIGHTNESS = f"{REWARDS}:Brightness"


@pytest.fixture(scope="session")
def run_folder_with_model(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose model/ is an exported one-step generator."""
    out = tmp_path_factory.mktemp("run")
    shutil.copytree(tiny_sdxl, out / "model")
    student = {"timesteps": [399.0], "transition": "stochastic", "input": "unit"}
    size = {"height": tiny.RESOLUTION, "width": tiny.RESOLUTION}
    (out / "model" / "student.json").write_text(json.dumps(student | size))
    return out


@pytest.fixture
def settings(run_folder_with_model: Path, tiny_prompts: Path) -> Callable[..., Settings]:
    """Settings of a small evaluation; keyword arguments change them."""

    def make(**changes: object) -> Settings:
        values = {
            "model": str(run_folder_with_model), "prompts": str(tiny_prompts), "limit": 5, "images_per_prompt": 2,
            "batch_size": 4, "metrics": [BRIGHTNESS, "diversity"], "features": "vae",
        }  # fmt: skip
        return build(values | changes)

    return make
