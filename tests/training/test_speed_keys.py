"""What trades memory, time and precision must leave the training alone: compile, checkpointing by role, a bf16 VAE."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_t2i.cluster.local import LocalCluster
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import compiling
from rlhf_t2i.families.base import Decoder
from rlhf_t2i.families.store import ModelStore, set_precision
from rlhf_t2i.recipe.schema import Optimization, Recipe, StudentSettings
from rlhf_t2i.roles.assistant import AssistantRole
from rlhf_t2i.roles.learner import LearnerRole
from tests.families.test_sampling import store
from tests.training.test_distributed import flat, relative, train

MakeRecipe = Callable[..., Recipe]
LORA = {"optimization__assistant__lora": "{rank: 2, targets: [to_q]}"}


def weights(cluster: LocalCluster) -> torch.Tensor:
    return flat(cluster.call_all("learner", LearnerRole.weights, "raw")[0])


def test_compiled_blocks_train_as_eager_ones(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside adapters and recomputed activations, which change how blocks are called.

    Blocks are captured as they would be, but run by PyTorch's own kernels: generating code takes minutes on a CPU.
    """
    from torch._dynamo.utils import counters

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_module, backend="aot_eager"))
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name)
    options = {"optimization__gradient_checkpointing": "[learner, reward]", **LORA}
    eager = LocalCluster(make_recipe(**options))
    start, expected = weights(eager), train(eager, 2)
    counters.clear()
    found = train(LocalCluster(make_recipe(optimization__compile=True, **options)), 2)
    assert counters["stats"]["unique_graphs"] > 4
    assert not counters["graph_break"]
    assert relative(found - start, expected - start) < 1e-3
    assert relative(expected, start) > 1e-3


def test_a_compiled_product_computes_no_gradient_of_weights(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled backward computes all gradients of its graph, asked for or not: that would double the work."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    products: list[int] = []

    def compiled(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        targets = [str(node.target) for node in graph.graph.nodes]
        products.append(sum(name.startswith(("aten.mm.", "aten.addmm.", "aten.bmm.")) for name in targets))
        masks = [node.args[-1] for node in graph.graph.nodes if "convolution_backward" in str(node.target)]
        products[-1] += sum(sum(mask[:2]) for mask in masks) + targets.count("aten.convolution.default")
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=compiled, bw_compiler=compiled)
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compile_module, backend=backend))
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name)
    cluster = LocalCluster(make_recipe(optimization__compile=True))
    assistant = cluster._worker.roles["assistant"]
    assert isinstance(assistant, AssistantRole)
    x_t, t, prompts = torch.randn(2, 4, 8, 8), torch.tensor([100, 700]), ["a cat", "a dog"]
    prediction = assistant.forward("a request", x_t, t, prompts, "conditional", True)
    forward, products = sum(products), []
    assistant.vjp("a request", x_t, t, prompts, "conditional", torch.ones_like(prediction))
    assert 0 < sum(products) <= forward
    assert all(p.grad is None and p.requires_grad for p in assistant.engine.module.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_generated_code_gives_the_same_prediction(tiny_sdxl: Path) -> None:
    from torch._dynamo.utils import counters

    x_t, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([100, 700])
    counters.clear()
    found = []
    for compiled in (False, True):
        models = ModelStore(store(tiny_sdxl).models, StudentSettings(), torch.device("cpu"), compiled=compiled)
        with torch.no_grad():
            condition = models.conditioner.encode(["a cat", "a dog"])
            found.append(models.predict(models.reference_network(), x_t, t, condition))
    assert counters["stats"]["unique_graphs"] > 1
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_compiling_needs_a_compiler(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda _name: None)
    with pytest.raises(UsageError, match="no C\\+\\+ compiler is here"):
        LocalCluster(make_recipe(optimization__compile=True))


def test_compiling_is_refused_under_zero_3() -> None:
    with pytest.raises(ValueError, match="compile does not work under ZeRO-3"):
        Optimization.model_validate({"compile": True, "zero_stage": 3})


def recomputing(cluster: LocalCluster) -> set[str]:
    """The roles whose blocks are checkpointed."""
    roles = cluster._worker.roles
    unets: dict[str, Any] = {
        "learner": roles["learner"].engine.module,
        "assistant": roles["assistant"].engine.module,
        "reference": roles["reference"]._network,
    }
    found = {role for role, unet in unets.items() if unet.is_gradient_checkpointing}
    decoder = cluster._worker._context.store.decoder.vae.decoder
    return found | ({"reward"} if isinstance(decoder.up_blocks[0].resnets[0].forward, partial) else set())


@pytest.mark.parametrize(
    ("chosen", "roles"),
    [
        ("false", set()),
        ("true", {"learner", "assistant", "reference", "reward"}),
        ("[reward, reference]", {"reward", "reference"}),
        ("[learner]", {"learner"}),
    ],
)
def test_activations_are_recomputed_where_the_recipe_says(
    make_recipe: MakeRecipe, chosen: str, roles: set[str]
) -> None:
    plain = train(LocalCluster(make_recipe()), 1)
    cluster = LocalCluster(make_recipe(optimization__gradient_checkpointing=chosen))
    assert recomputing(cluster) == roles
    assert torch.equal(train(cluster, 1), plain)


def test_compiled_code_is_kept_in_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    compiling.compile_blocks(torch.nn.Linear(1, 1), ())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "own")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"cannot be made \(Not a directory\): set TORCHINDUCTOR_CACHE_DIR"):
        compiling.compile_blocks(torch.nn.Linear(1, 1), ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiling.compile_blocks(torch.nn.Linear(1, 1), ())
    folder = tmp_path / "rlhf-t2i/inductor"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_mixed_decoder_is_the_float32_one_on_a_cpu_and_attends_in_bf16_elsewhere(tiny_sdxl: Path) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.13

    def decode(decoder: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = latents.clone().requires_grad_(True)
        pictures = decoder.decode(leaf)
        return pictures.detach(), torch.autograd.grad(pictures.square().sum(), leaf)[0]

    exact = store(tiny_sdxl, vae_precision="fp32").decoder
    plain, mixed = decode(exact), decode(store(tiny_sdxl, vae_precision="mixed").decoder)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))
    halved = set_precision(copy.deepcopy(exact), "mixed", torch.device("cuda"))
    seen: list[torch.dtype] = []
    attention = halved.vae.decoder.mid_block.attentions[0]
    attention.to_v.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    attention.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    pictures, gradient = decode(halved)
    assert seen == [torch.bfloat16, torch.float32]
    assert {p.dtype for p in halved.parameters()} == {torch.float32}
    assert 0 < float((pictures - plain[0]).abs().max()) < 1 / 255
    assert gradient.dtype == torch.float32
    assert 0.9999 < float(torch.cosine_similarity(gradient.flatten(), plain[1].flatten(), dim=0)) <= 1.00001


def test_a_bf16_decoder_gives_nearly_the_same_pictures_and_gradients(tiny_sdxl: Path) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.13
    found = []
    for precision in ("fp32", "bf16"):
        leaf = latents.clone().requires_grad_(True)
        pictures = store(tiny_sdxl, vae_precision=precision).decoder.decode(leaf)
        assert pictures.dtype == torch.float32
        found.append((pictures.detach(), torch.autograd.grad(pictures.square().sum(), leaf)[0]))
    (pictures, gradient), (coarse, coarse_gradient) = found
    assert 1e-5 < float((coarse - pictures).abs().max()) < 0.05
    assert float(torch.cosine_similarity(coarse_gradient.flatten(), gradient.flatten(), dim=0)) > 0.99
