"""A small ablation recipe, its fake trainer and its fake evaluation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny

TRAIN = (sys.executable, "-m", "tests.ablation.fake_train")
MEASURE = (sys.executable, "-m", "tests.ablation.fake_measure")


def small() -> dict[str, Any]:
    kl = {"algorithm.divergence.name": "kl"}
    return {
        "title": "A small ablation",
        "base": "./base.yaml",
        "seeds": [0, 1],
        "scale_unit": 0.5,
        "initial": "initial",
        "evaluation": {"prompts": "./prompts.txt", "images_per_prompt": 2, "metrics": ["pickscore", "diversity"],
                       "features": "vae"},
        "labels": {"pickscore": "PickScore", "pairwise_distance": "Diversity"},
        "factors": {"pairwise_distance": 100},
        "plots": [["pairwise_distance", "pickscore"]],
        "rows": [
            {"name": "initial", "label": "Initial model", "train": False, "paper": {"pickscore": 0.2249}},
            {"name": "kl_10", "label": "DI++ (10)", "set": kl, "paper_scale": 10.0},
            {"name": "kl_2000", "label": "DI++ (2000)", "set": kl, "paper_scale": 2000.0, "note": "not in the paper"},
            {"name": "ph_10", "label": "DI* (10)", "paper_scale": 10.0},
            {"name": "ph_100", "label": "DI* (100)", "paper_scale": 100.0, "paper": {"pickscore": 0.2304}},
        ],
        "frontiers": [{"name": "KL", "rows": ["kl_10", "kl_2000"]}, {"name": "score", "rows": ["ph_10", "ph_100"]}],
        "claims": [
            {"text": "Score keeps more diversity at equal reward", "metric": "pairwise_distance", "more": "score",
             "less": "KL", "at_equal": "pickscore"},
            {"text": "A larger scale lowers the reward", "metric": "pickscore", "more": "ph_10", "less": "ph_100"},
        ],
    }  # fmt: skip


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_sdxl: Path, tiny_prompts: Path) -> Callable[..., Path]:
    """Write the ablation with changes and give its path."""
    (tmp_path / "prompts.txt").write_bytes(tiny_prompts.read_bytes())
    base = tiny.recipe_dict(tiny_sdxl, tmp_path / "prompts.txt", steps=3)
    base["algorithm"] = {"rewards": [{"name": "pickscore", "scale": 100.0}]}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def write(**changes: Any) -> Path:
        path = tmp_path / "ablation.yaml"
        path.write_text(yaml.safe_dump(small() | changes, sort_keys=False))
        return path

    return write
