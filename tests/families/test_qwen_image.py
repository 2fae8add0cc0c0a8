"""Qwen-Image: batches of ragged prompts, bare weights, and models that its pipeline cannot call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import nn

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import registry, sources
from rlhf_t2i.families.base import Family
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe.schema import Models, StudentSettings
from tests import tiny_families

PROMPTS = ["a red cat, smiling", "a gold whale"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.make_qwen_image(tmp_path_factory.mktemp("tiny_qwen_image"))


def store(folder: Path) -> ModelStore:
    models = Models(reference=str(folder), generator=str(folder), height=16, width=24)
    return ModelStore(models, StudentSettings(), torch.device("cpu"))


class Recorder(nn.Module):
    """A network that keeps how it is called, and predicts zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.calls: list[dict[str, Any]] = []

    def forward(self, **arguments: Any) -> tuple[torch.Tensor]:
        self.calls.append(arguments)
        return (torch.zeros_like(arguments["hidden_states"]),)


def test_a_batch_of_ragged_prompts_is_the_pipelines(folder: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    theirs, ours = Recorder(), Recorder()
    pipe.transformer.forward = theirs.forward
    size = {"height": 16, "width": 24, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    pipe(PROMPTS, num_inference_steps=2, true_cfg_scale=1.0, **size)
    models = store(folder)
    noise = torch.randn(2, *models.latent_shape, generator=torch.Generator().manual_seed(0))
    for prompts in (PROMPTS, PROMPTS[:1]):
        count = len(prompts)
        cond, t = models.conditioner.encode(prompts), torch.full((count,), 1000.0)
        raw = models.predict(ours, noise[:count], t, cond)
        assert raw.shape == (count, *models.latent_shape)
    (pipelines, _), (batch, alone) = theirs.calls, ours.calls
    assert batch["encoder_hidden_states_mask"].sum(1).diff() < 0  # the second prompt is shorter
    for name in ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_mask"):
        torch.testing.assert_close(batch[name], pipelines[name].to(batch[name].dtype), rtol=0, atol=1e-6)
    assert batch["img_shapes"] == pipelines["img_shapes"]
    assert alone["encoder_hidden_states_mask"] is None  # nothing is padded


def test_bare_weights_are_called_like_a_folder(folder: Path, tmp_path: Path) -> None:
    """The rotary frequencies are in no file: a network that is built without memory must still have them."""
    models = store(folder)
    network: Any = models.family.load_network()
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    bare = models.family.load_network(sources.parse(str(tmp_path / "network.safetensors")))
    noise = torch.randn(2, *models.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, t = models.conditioner.encode(PROMPTS), torch.full((2,), 700.0)
    with torch.no_grad():
        ours, theirs = (models.predict(one, noise, t, cond) for one in (bare, network))
    assert theirs.std() > 0.05
    assert torch.equal(ours, theirs)


def check(family: Family) -> None:
    family.check()
    family.check_decoder(None)


DAMAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "guidance_embeds is true": ("transformer", {"guidance_embeds": True}),
    "latents_std is not one number per channel": ("vae", {"latents_std": [1.0]}),
    "temperal_downsample is no list": ("vae", {"temperal_downsample": 3}),
    "decodes latents of 8 channels, but the network has 4": (
        "vae",
        {"z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8},
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_what_its_pipeline_cannot_call_is_refused(message: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    part, changes = DAMAGE[message]
    file = tmp_path / "model" / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")
    family = registry.find(sources.parse(str(tmp_path / "model")))
    with pytest.raises(UsageError, match=message):
        check(family)
