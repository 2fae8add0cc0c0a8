"""SANA: the time its networks are given, and models that its pipeline cannot call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import registry, sources
from rlhf_t2i.families.base import Family

CONFIGS = Path(registry.__file__).parent / "configs" / "Efficient-Large-Model--Sana_1600M_1024px_diffusers"


def changed(tmp_path: Path, part: str, file: str, **changes: Any) -> Family:
    """The published configuration with some values replaced."""
    shutil.copytree(CONFIGS, tmp_path / "model")
    path = tmp_path / "model" / part / file
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    return registry.find(sources.parse(str(tmp_path / "model")))


@pytest.mark.parametrize(("scale", "time"), [(1.0, 500.0), (0.001, 0.5)])
def test_the_time_is_scaled_as_the_network_says(scale: float, time: float, tmp_path: Path) -> None:
    """SANA takes 1000 s, the teacher of SANA-Sprint s."""
    family = changed(tmp_path, "transformer", "config.json", timestep_scale=scale)
    family.check()
    assert family.schedule(0, 0).network_time(torch.tensor([500.0])).tolist() == [time]


@pytest.mark.parametrize(
    ("solver", "shift"),
    [({"flow_shift": 6.0}, 6.0), ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}, 2.0)],
)
def test_the_shift_is_the_schedulers(solver: dict[str, Any], shift: float, tmp_path: Path) -> None:
    family = changed(tmp_path, "scheduler", "scheduler_config.json", **solver)
    assert family.schedule(0, 0).default_law().shift == shift


def check(family: Family) -> None:
    family.check()
    family.check_decoder(None)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer", {"timestep_scale": 0.5}, "timestep_scale is 0.5, not 1 or 0.001"),
        ("transformer", {"guidance_embeds": True}, "guidance_embeds is True"),
        ("transformer", {"patch_size": 2}, "patch_size is 2"),
        ("scheduler", {"prediction_type": "epsilon"}, "prediction_type is .*epsilon.*trained by flow matching"),
        ("vae", {"latent_channels": 16}, "decodes latents of 16 channels, but the network has 32"),
    ],
)
def test_what_its_pipeline_cannot_call_is_refused(
    part: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = "scheduler_config.json" if part == "scheduler" else "config.json"
    family = changed(tmp_path, part, file, **changes)
    with pytest.raises(UsageError, match=message):
        check(family)
