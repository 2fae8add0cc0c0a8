"""SANA: the time its networks are given, SANA-Sprint beside it, and models that its pipeline cannot call."""

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
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe.schema import Models, StudentSettings
from tests import tiny_families

CONFIGS = Path(registry.__file__).parent / "configs" / "Efficient-Large-Model--Sana_1600M_1024px_diffusers"


def changed(tmp_path: Path, part: str, file: str, **changes: Any) -> Family:
    """The published configuration with some values replaced."""
    shutil.copytree(CONFIGS, tmp_path / "model")
    path = tmp_path / "model" / part / file
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    return registry.find(sources.parse(str(tmp_path / "model")))


@pytest.mark.parametrize(("scale", "time"), [(1.0, 500.0), (0.001, 0.5)])
def test_the_time_is_scaled_as_the_network_says(scale: float, time: float, tmp_path: Path) -> None:
    """SANA takes 1000 s; its pipeline also calls networks that take s."""
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
        ("transformer", {"timestep_scale": [1]}, "timestep_scale is .*, not 1 or 0.001"),
        ("scheduler", {"flow_shift": -3}, "scheduler_config.json has no positive number flow_shift"),
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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sana")
    return {name: tiny_families.make_sana(folder / name, sprint=name == "sprint") for name in ("sana", "sprint")}


def store(models: dict[str, Path], **changes: Any) -> ModelStore:
    student = StudentSettings(**changes.pop("student", {}))
    settings = {"reference": str(models["sana"]), "generator": str(models["sprint"]), "height": 32, "width": 32}
    return ModelStore(Models(**{**settings, **changes}), student, torch.device("cpu"))


@pytest.mark.parametrize("part", ["", "transformer"])
def test_sprint_draws_beside_a_sana(part: str, models: dict[str, Path]) -> None:
    """Given as a pipeline or as a network alone: its prediction is its pipeline's, with the reference's encoders."""
    both = store(models, generator=str(models["sprint"] / part), student={"steps": 2})
    both.check()
    assert (both.family.name, both.generator_family.name) == ("sana", "sana_sprint")
    assert both.student.timesteps == pytest.approx((1000, 782.708), abs=1e-3)
    alone = store(models, reference=str(models["sprint"]), student={"steps": 2})
    noise = torch.randn(2, 1, *both.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (
            one.generate(one.generator_network(), ["a red cat"], lambda k: noise[k]) for one in (both, alone)
        )
    assert both.reference_network().state_dict().keys() != both.generator_network().state_dict().keys()
    assert theirs.std() > 0.1
    # Both models have the same encoders; what may differ is how the network is called.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"timesteps": [1000, 500]}}, "draws 2 steps at 1000, 782.708 alone"),
        ({"student": {"transition": "deterministic"}}, "student.transition: a SanaSprintPipeline draws fresh noise"),
        ({"assistant": "sprint"}, "models.assistant: .* has guidance_embeds True"),
    ],
)
def test_what_sprint_cannot_do_is_refused(changes: dict[str, Any], message: str, models: dict[str, Path]) -> None:
    found = store(models, **{key: str(models["sprint"]) if key == "assistant" else changes[key] for key in changes})
    with pytest.raises(UsageError, match=message):
        found.check()


def test_a_sprint_whose_guidance_has_no_scale_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["sprint"], tmp_path / "sprint")
    file = tmp_path / "sprint/transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"guidance_embeds_scale": "x"}), "utf-8")
    for place in ("reference", "generator"):
        with pytest.raises(UsageError, match="guidance_embeds_scale is 'x', no number"):
            store(models, **{place: str(tmp_path / "sprint")}).check()


def test_a_sprint_of_another_size_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["sprint"], tmp_path / "sprint")
    file = tmp_path / "sprint/transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"num_layers": 1}), "utf-8")
    with pytest.raises(UsageError, match=r"models.generator: .* has num_layers 1, the reference's network has 2"):
        store(models, generator=str(tmp_path / "sprint")).check()


def test_sizes_that_the_pipeline_refuses_are_refused(models: dict[str, Path]) -> None:
    assert store(models, height=64).latent_shape[1:] == (32, 16)
    with pytest.raises(UsageError, match=r"^models\.height: 40 is not a multiple of 32, as SanaPipeline asks$"):
        store(models, height=40).check()
