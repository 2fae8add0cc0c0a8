"""The scheduler's configuration of a flow-matching model: read as its pipeline reads it, or refused in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from rlhf_t2i.algorithm.schedules import FlowSchedule
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import registry, sources
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe.schema import Models, StudentSettings
from tests import tiny_families

CONFIG = "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def models(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flows")
    made = {"z_image": tiny_families.make_z_image, "flux": tiny_families.make_flux}
    return {"sd3": tiny_sd3} | {name: make(folder / name) for name, make in made.items()}


@pytest.fixture
def changed(models: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A model with other values in its scheduler's configuration."""

    def build(name: str, values: dict[str, Any]) -> Path:
        shutil.copytree(models[name], tmp_path / name)
        config = json.loads((models[name] / CONFIG).read_text("utf-8"))
        (tmp_path / name / CONFIG).write_text(json.dumps(config | values), "utf-8")
        return tmp_path / name

    return build


@pytest.mark.parametrize("name", ["sd3", "z_image", "flux"])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_shift_that_grows_with_the_image_is_the_pipelines(name: str, kind: str, changed: Callable[..., Path]) -> None:
    values = {
        "use_dynamic_shifting": True, "time_shift_type": kind, "base_shift": 0.6, "max_shift": 1.3,
        "base_image_seq_len": 4, "max_image_seq_len": 64,
    }  # fmt: skip
    family = registry.find(sources.parse(str(changed(name, values))))
    schedule = family.schedule(32, 16)
    _, h, w = family.latent_shape(32, 16)
    scheduler = FlowMatchEulerDiscreteScheduler(**values)
    mu = calculate_shift(h * w // 4, 4, 64, 0.6, 1.3)
    assert isinstance(schedule, FlowSchedule)
    u = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(schedule.default_law().inverse_cdf(u).float(), scheduler.time_shift(mu, 1.0, u))


@pytest.mark.parametrize("name", ["sd3", "z_image", "flux"])
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_train_timesteps": 500}, "num_train_timesteps is 500"),
        ({"num_train_timesteps": None}, "num_train_timesteps is None"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"use_dynamic_shifting": True, "base_shift": None}, "no positive number base_shift"),
        ({"use_dynamic_shifting": True, "base_image_seq_len": 8, "max_image_seq_len": 8}, "are both 8"),
    ],
)
def test_another_time_than_the_network_was_trained_at_is_refused(
    name: str, values: dict[str, Any], words: str, changed: Callable[..., Path], tmp_path: Path
) -> None:
    models = Models(reference=str(changed(name, values)), generator=str(tmp_path / name), height=16, width=16)
    with pytest.raises(UsageError, match=words) as refused:
        ModelStore(models, StudentSettings(), torch.device("cpu")).check()
    assert "scheduler_config.json" in str(refused.value)
