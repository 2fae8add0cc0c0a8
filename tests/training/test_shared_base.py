"""Adapters on one base: the same bits as on copies, in the memory that is planned; and the adapter's own export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rlhf_t2i
from rlhf_t2i.algorithm.student import keyed_noise
from rlhf_t2i.cluster.local import LocalCluster
from rlhf_t2i.families.base import Family
from rlhf_t2i.families.sources import ModelRef
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.assistant import AssistantRole
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.roles.worker import Worker, WorkerSpec
from tests import tiny, tiny_families
from tests.training.ranks import run_ranks

MODELS: dict[str, Callable[[Path], Path]] = {
    "sdxl": tiny.make_sdxl,
    "sd3": tiny.make_sd3,
    "flux2": tiny_families.make_flux2_klein,
    "z_image": tiny_families.make_z_image,
}
LORA = {"lora": {"rank": 4, "alpha": 8.0}, "lr": 1e-2, "eps": 1e-4}


def recipe(model: Path, prompts: Path, **changes: Any) -> Recipe:
    keys = tiny.recipe_dict(
        model, prompts, logging={"sample_count": 1}, evaluation={"images": 2, "images_per_prompt": 2}, steps=1
    )
    keys["optimization"] |= {"generator": LORA, "assistant": LORA}
    keys["models"] |= changes
    return reading.build(keys)


def networks(cluster: LocalCluster) -> dict[str, nn.Module]:
    roles = cluster._worker.roles
    return {
        "learner": roles["learner"].engine.module,
        "assistant": roles["assistant"].engine.module,
        "reference": roles["reference"]._network,
    }


def held(modules: dict[str, nn.Module], *, trained: bool) -> int:
    """Bytes of the distinct storages under all parameters."""
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad == trained]
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}.values())


def run(cluster: LocalCluster, prompts: Path) -> tuple[list[Any], list[Any], dict[str, Tensor]]:
    texts = prompts.read_text().splitlines()
    assistant = cluster.call_all("assistant", AssistantRole.train, 0, texts[:2])
    learner = cluster.call_all("learner", LearnerRole.step, 0, texts[:2])
    return assistant, learner, cluster.call_all("learner", LearnerRole.weights, "raw")[0]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param](tmp_path_factory.mktemp(request.param) / "model")


def test_a_shared_base_changes_no_bit(model: Path, tiny_prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = LocalCluster(recipe(model, tiny_prompts))
    found = run(shared, tiny_prompts)
    bases = held(networks(shared), trained=False)
    with monkeypatch.context() as patch:
        network = ModelStore._network
        patch.setattr(ModelStore, "_network", lambda *args, shared: network(*args, shared=False))
        apart = LocalCluster(recipe(model, tiny_prompts))
        wanted = run(apart, tiny_prompts)
    assert found[:2] == wanted[:2]
    assert all(torch.equal(tensor, wanted[2][name]) for name, tensor in found[2].items())
    assert bases < 0.6 * held(networks(apart), trained=False)


def test_planned_and_held_memory_agree(model: Path, tiny_prompts: Path) -> None:
    chosen = recipe(model, tiny_prompts)
    modules = networks(LocalCluster(chosen))
    (group,) = rlhf_t2i.plan(chosen).groups
    planned = sum(role.memory.weights for role in group.roles if role.role in modules)
    assert planned == pytest.approx(held(modules, trained=False) + held(modules, trained=True), rel=1e-3)
    if "unet" not in [path.name for path in model.iterdir()]:
        (one,) = {sum(4 * p.numel() for p in modules["reference"].parameters())}
        assert held(modules, trained=False) == pytest.approx(one, rel=0.02)  # one base, not three


def deepspeed_roles(recipe: Recipe) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Learner, assistant and reference of one DeepSpeed rank after an update of the learner."""
    worker = Worker(WorkerSpec(recipe, "all", ("learner", "assistant", "reference"), distributed=True))
    learner = worker.roles["learner"]
    noise = keyed_noise(learner._store.latent_shape, [(0, "z"), (1, "z")], learner.device)
    learner.engine.backward(learner._store.generate(learner.engine, ["a cat", "a dog"], noise).square().mean())
    learner.engine.step(1e-2)
    modules = {
        "learner": learner.engine.module,
        "assistant": worker.roles["assistant"].engine.module,
        "reference": worker.roles["reference"]._network,
    }
    return modules, learner.weights("raw")


def one_deepspeed_rank(rank: int, recipe: Recipe) -> None:
    with pytest.MonkeyPatch.context() as patch:
        modules, found = deepspeed_roles(recipe)
        assert {p.dtype for p in modules["learner"].parameters()} == {torch.bfloat16}
        one = sum(2 * p.numel() for p in modules["reference"].parameters())
        assert held(modules, trained=False) == pytest.approx(one, rel=0.02)
        network = ModelStore._network

        def apart(self: ModelStore, family: Family, source: ModelRef, dtype: torch.dtype, shared: bool) -> nn.Module:
            # As trained networks are loaded: float32, which DeepSpeed rounds.
            return network(self, family, source, torch.float32 if shared else dtype, shared=False)

        patch.setattr(ModelStore, "_network", apart)
        modules, wanted = deepspeed_roles(recipe)
        assert held(modules, trained=False) > 2 * one
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def test_deepspeed_in_bf16_keeps_the_base_shared(tmp_path: Path, tiny_sd3: Path, tiny_prompts: Path) -> None:
    keys = recipe(tiny_sd3, tiny_prompts).model_dump()
    keys["optimization"] |= {"precision": "bf16", "zero_stage": 1}
    keys["placement"] = {"mode": "ray"}
    run_ranks(1, tmp_path, one_deepspeed_rank, reading.build(keys))


def test_a_trained_network_shares_nothing(tmp_path: Path, tiny_sd3: Path, tiny_prompts: Path) -> None:
    keys = tiny.recipe_dict(tiny_sd3, tiny_prompts)
    cluster = LocalCluster(reading.build(keys))
    before = {name: p.clone() for name, p in networks(cluster)["reference"].named_parameters()}
    run(cluster, tiny_prompts)
    modules = networks(cluster)
    assert all(torch.equal(p, before[name]) for name, p in modules["reference"].named_parameters())
    pointers = [{p.untyped_storage().data_ptr() for p in module.parameters()} for module in modules.values()]
    assert not pointers[0] & pointers[1] | pointers[0] & pointers[2] | pointers[1] & pointers[2]


def test_another_start_has_a_base_of_its_own(tmp_path: Path, tiny_sd3: Path, tiny_prompts: Path) -> None:
    """FLUX.2 klein: the generator starts from the distilled model, reference and assistant from the base model."""
    distilled = tiny.make_sd3(tmp_path / "distilled", seed=7)
    modules = networks(LocalCluster(recipe(tiny_sd3, tiny_prompts, generator=str(distilled))))
    one = sum(4 * p.numel() for p in modules["reference"].parameters())
    assert held(modules, trained=False) == pytest.approx(2 * one, rel=0.02)


def test_the_adapter_alone_draws_what_the_merged_model_draws(model: Path, tmp_path: Path, tiny_prompts: Path) -> None:
    from diffusers import DiffusionPipeline

    out = tmp_path / "out"
    rlhf_t2i.train(recipe(model, tiny_prompts), out)
    part = "unet" if (model / "unet").is_dir() else "transformer"
    merged = getattr(DiffusionPipeline.from_pretrained(out / "model", local_files_only=True), part).state_dict()
    pipe = DiffusionPipeline.from_pretrained(model, local_files_only=True)
    start = {name: tensor.clone() for name, tensor in getattr(pipe, part).state_dict().items()}
    pipe.load_lora_weights(out / "adapter")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = getattr(pipe, part).state_dict()
    moved = [name for name in start if (merged[name] - start[name]).abs().max() > 1e-4]
    assert moved
    for name in start:
        torch.testing.assert_close(fused[name], merged[name], rtol=1e-5, atol=1e-6)


def test_no_adapter_is_written_of_a_moving_average(tmp_path: Path, tiny_sd3: Path, tiny_prompts: Path) -> None:
    chosen = recipe(tiny_sd3, tiny_prompts).model_dump()
    chosen["optimization"]["ema"] = {"half_life_kimg": 0.01}
    rlhf_t2i.train(chosen, tmp_path / "out")
    assert (tmp_path / "out/model").is_dir()
    assert not (tmp_path / "out/adapter").exists()
