"""Nothing stays behind on the CPU: runs, rewards and evaluations on a device that refuses to mix (tests/pretended)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_t2i.evaluation import run as evaluation_run
from rlhf_t2i.evaluation.settings import Settings
from rlhf_t2i.plugins import registry
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles import worker
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.training import run
from tests import pretended
from tests.evaluation.conftest import run_folder_with_model, settings  # noqa: F401
from tests.rewards import builders, qwen_builders
from tests.rewards.test_role import Decoder
from tests.training.test_run import metrics

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The project's own device is the pretended one."""
    import torch.optim.adam as adam

    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_: None)  # it knows GPUs by name
    for module in (worker, evaluation_run):
        monkeypatch.setattr(module, "default_device", lambda: pretended.DEVICE)
    with pretended.pretended_device():
        yield


def test_the_device_refuses_to_mix(device: None) -> None:
    there, here = torch.ones(2, device=pretended.DEVICE), torch.ones(2)
    assert float((there * 2.0 * torch.tensor(3.0)).sum()) == 12.0
    assert (there + here.to(there)).device == pretended.DEVICE
    for mixed in (lambda: there + here, lambda: here[there.long()], lambda: torch.cat([here, there])):
        with pytest.raises(RuntimeError, match="on the same device, but found"):
            mixed()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimization__ema": "{half_life_kimg: 0.01}", "logging__watch_every": 2, "logging__watch_images": 4},
        {"algorithm__cfg__mode": "outer", "optimization__micro_batch": 2, "algorithm__divergence": "{name: kl}"},
        {"optimization__generator__lora": "{rank: 2}", "optimization__assistant__lora": "{rank: 2}"},
        {"models__vae_tiling": "true", "models__vae_slicing": "true"},
    ],
    ids=["averaged and watched", "outer CFG and KL", "adapters", "tiles and slices"],
)
def test_a_run(device: None, make_recipe: MakeRecipe, tmp_path: Path, changes: dict[str, Any]) -> None:
    run.run(make_recipe(**changes), tmp_path / "out")
    assert len(metrics(tmp_path / "out")) == 3
    assert (tmp_path / "out/model/model_index.json").is_file()


def test_a_run_of_sd15(device: None, make_recipe: MakeRecipe, tiny_sd15: Path, tiny_clip: Path, tmp_path: Path) -> None:
    rewards = f"[{{name: clip, scale: 1, options: {{model: {tiny_clip}}}}}, {{name: cfg_implicit, scale: 2.0}}]"
    models = f"{{reference: {tiny_sd15}, generator: {tiny_sd15}/unet, height: 16, width: 16}}"
    run.run(make_recipe(models=models, algorithm__rewards=rewards), tmp_path / "out")
    assert len(metrics(tmp_path / "out")) == 3


def _options(name: str, folder: Path) -> dict[str, str]:
    if name == "image_reward":
        return {"model": str(builders.write_image_reward(folder))}
    if name == "hpsv3":
        return qwen_builders.hpsv3_options(qwen_builders.write_hpsv3(folder))
    if name == "vlm_choice":
        return {"model": str(qwen_builders.write_vlm(folder))}
    if name == "hpsv2":
        return {"model": str(builders.write_hpsv2(folder))}
    if name == "aesthetic":
        clip, head = builders.write_aesthetic(folder)
        return {"model": str(clip), "head": str(head)}
    return {"model": str(builders.write_clip(folder))}


@pytest.mark.parametrize("name", ["pickscore", "clip", "image_reward", "hpsv2", "hpsv3", "aesthetic", "vlm_choice"])
def test_a_reward(device: None, tmp_path: Path, name: str) -> None:
    options, prompts = _options(name, tmp_path / "model"), ["a cat", "a dog", "an owl"]
    latents = torch.randn(3, 4, 9, 9, generator=torch.Generator().manual_seed(3))
    found = []
    for where in (torch.device("cpu"), pretended.DEVICE):
        role = RewardRole(
            {name: registry.reward(name, **options)}, Decoder().to(where), device=where, dtype=torch.float32
        )
        value, gradient = role.value_and_grad(latents.to(where), prompts)[name]
        assert value.device == gradient.device == where
        found.append((value.cpu(), gradient.cpu()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_an_evaluation(device: None, settings: Callable[..., Settings], tmp_path: Path) -> None:  # noqa: F811
    evaluation_run.evaluate(settings(), tmp_path)
    assert len(json.loads((tmp_path / "results.json").read_text())["images"]) == 10
