"""Training adapters: the whole run, what a checkpoint holds, resuming bit for bit, and ZeRO against local."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_t2i.cluster.local import LocalCluster
from rlhf_t2i.errors import RunError, Stopped, UsageError
from rlhf_t2i.recipe.schema import Optimization, Recipe
from rlhf_t2i.roles.assistant import AssistantRole
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.roles.trained import TrainedRole
from rlhf_t2i.training import run
from tests.training.test_distributed import PROMPTS, flat, relative, start_ray, together, train
from tests.training.test_run import StopAt, metrics, model_bytes

MakeRecipe = Callable[..., Recipe]
ADAPTERS = {
    "optimization__generator__lora": "{rank: 4}",
    "optimization__assistant__lora": "{rank: 2, alpha: 4}",
}


def test_the_assistant_starts_as_the_reference(make_recipe: MakeRecipe) -> None:
    cluster = LocalCluster(make_recipe(**ADAPTERS))
    roles = cluster._worker.roles
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    request = ("request_id", x_t, torch.tensor([100, 700]), PROMPTS[:2], "conditional", False)
    # Frozen weights lie channels last, trained ones as they were: convolutions sum in another order.
    torch.testing.assert_close(
        roles["assistant"].forward(*request), roles["reference"].forward(*request), rtol=1e-5, atol=1e-5
    )


def test_resume_is_bit_identical_and_the_export_is_plain(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_sdxl: Path
) -> None:
    from diffusers import UNet2DConditionModel

    recipe = make_recipe(optimization__ema="{half_life_kimg: 0.01}", optimization__micro_batch=2, **ADAPTERS)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run.run(recipe, whole)
    with monkeypatch.context() as patch:
        callback = StopAt(patch, 2, 0)
        with pytest.raises(Stopped):
            run.run(recipe, broken, callback=callback)
    run.run(recipe, broken, resume=True)
    assert model_bytes(broken) == model_bytes(whole)
    assert metrics(broken) == metrics(whole)
    for role in ("learner", "assistant"):
        state = torch.load(whole / f"checkpoints/step_000003/{role}/local.pt", weights_only=True)
        assert state["module"]
        assert all(".lora_" in name for name in state["module"])

    start = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet").state_dict()
    trained = UNet2DConditionModel.from_pretrained(whole / "model", subfolder="unet").state_dict()
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    assert moved == {n for n in start if n.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))}


def test_checkpointed_activations_and_bf16_reach_every_adapter(make_recipe: MakeRecipe) -> None:
    """With a frozen base no input of a block wants a gradient: re-entrant checkpointing would give none."""
    options = {"optimization__gradient_checkpointing": True, "optimization__precision": "bf16", **ADAPTERS}
    found = []
    for recipe in (make_recipe(**options), make_recipe(**ADAPTERS)):
        cluster = LocalCluster(recipe)
        for role, method in (("assistant", AssistantRole.train), ("learner", LearnerRole.step)):
            cluster.call_all(role, method, 0, PROMPTS)
        for engine in (cluster._worker.roles["assistant"].engine, cluster._worker.roles["learner"].engine):
            factors = {n: p for n, p in engine.module.named_parameters() if ".lora_B." in n}
            assert factors
            assert all(float(p.detach().abs().max()) > 0 for p in factors.values())  # they started at zero
            found.append(torch.cat([p.detach().flatten() for p in factors.values()]))
    for frugal, plain in zip(found[:2], found[2:], strict=True):
        assert torch.cosine_similarity(frugal, plain, dim=0) > 0.9


def test_a_checkpoint_of_other_adapters_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    cluster = LocalCluster(make_recipe(**ADAPTERS))
    cluster.call_all("learner", LearnerRole.save, str(tmp_path))
    cluster.finish_saving("learner")
    with pytest.raises(RunError, match="other weights than this recipe trains"):
        LocalCluster(make_recipe()).call_all("learner", LearnerRole.load, str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"zero_stage": 3, "generator": {"lora": {}}}, "generator.lora does not work under ZeRO-3"),
        ({"offload_optimizer": True, "assistant": {"kind": "adamw_8bit"}}, "use it or offload_optimizer"),
        ({"offload_optimizer": True, "zero_stage": 0}, "set zero_stage to 1, 2 or 3"),
    ],
)
def test_impossible_combinations(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Optimization.model_validate(settings)


@pytest.mark.parametrize(("installed", "sentence"), [(False, "needs bitsandbytes"), (True, "needs an NVIDIA GPU")])
def test_eight_bit_states_say_what_they_need(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: bool, sentence: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from rlhf_t2i.engines import base as engine

    optimizer = make_recipe(optimization__generator__kind="adamw_8bit").optimization.generator
    with pytest.raises(UsageError, match=sentence):
        engine.adamw([torch.nn.Parameter(torch.zeros(2))], optimizer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_eight_bit_states_train(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    cluster = LocalCluster(make_recipe(optimization__generator__kind="adamw_8bit"))
    start = flat(cluster.call_all("learner", LearnerRole.weights, "raw")[0])
    assert relative(train(cluster, 3), start) > 1e-3


@pytest.mark.ray
@pytest.mark.slow
def test_zero_1_equals_local_and_resumes(ray_instance: None, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    local = LocalCluster(make_recipe(**ADAPTERS))
    start = flat(local.call_all("learner", LearnerRole.weights, "raw")[0])
    expected = train(local, 4)
    assert relative(expected, start) > 1e-4
    cluster = start_ray(together(make_recipe, 1, **ADAPTERS))
    try:
        halfway = train(cluster, 2)
        for role in ("learner", "assistant"):
            (tmp_path / role).mkdir()
            cluster.call_all(role, TrainedRole.save, str(tmp_path / role))
        for step in (2, 3):
            cluster.call_all("assistant", AssistantRole.train, step, PROMPTS)
            cluster.call_all("learner", LearnerRole.step, step, PROMPTS)
            cluster.sync_generator()
        assert relative(flat(cluster.call_all("learner", LearnerRole.weights, "raw")[0]), expected) < 1e-5
        for role in ("learner", "assistant"):
            cluster.finish_saving(role)
            cluster.call_all(role, TrainedRole.load, str(tmp_path / role))
        assert torch.equal(flat(cluster.call_all("learner", LearnerRole.weights, "raw")[0]), halfway)
    finally:
        cluster.close()
