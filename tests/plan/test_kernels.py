"""Kernels of a network: counted in its forward, derived for its gradients, and timed by a data sheet's roofline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlhf_t2i.families import counting, kernels
from rlhf_t2i.families.counting import Network
from rlhf_t2i.families.kernels import Kernel
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning.devices import DEVICES, LAUNCH, MATMUL, MEMORY, SHORTEST
from rlhf_t2i.tools.planning.plan import networks_of
from rlhf_t2i.tools.planning.speed import Roofline
from tests import tiny

H100 = DEVICES["h100-80gb"]


def network(name: str, build: Callable[[], nn.Module], *shape: int) -> Network:
    def meta() -> nn.Module:
        with torch.device("meta"):
            return build()

    def call(module: nn.Module) -> tuple[Tensor, Tensor]:
        x = torch.empty(shape, device="meta", requires_grad=True)
        return x, module(x)

    return Network((name, shape), meta, call)


def test_kernels_worked_out_by_hand() -> None:
    """A product of [8, 32] with [32, 64], a bias and SiLU, in float32; views start nothing."""
    layers = network("mlp", lambda: nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Flatten()), 1, 8, 32)
    product = Kernel("matmul", 32, 2 * 8 * 32 * 64, 4 * 8 * (32 + 64), 4 * (32 + 1) * 64)
    silu = Kernel("memory", 32, 0, 2 * 4 * 8 * 64, 0)
    assert layers.kernels() == {product: 1, silu: 1}
    assert kernels.of_pass(layers.kernels(), "inputs") == {product: 1, Kernel("memory", 32, 0, 3 * 4 * 8 * 64, 0): 1}
    assert kernels.of_pass(layers.kernels(), "weights") == {product: 1}


def test_attention_keeps_its_scores_on_the_chip() -> None:
    query, key = torch.empty(1, 4, 16, 8, device="meta"), torch.empty(1, 4, 77, 8, device="meta")
    found = kernels.attention(query, key, key)
    assert found == Kernel("attention", 32, 2 * 4 * 16 * 77 * 16, 4 * 4 * 8 * (2 * 16 + 2 * 77), 0)
    (backward,) = kernels.of_pass(kernels.Kernels({found: 1}), "inputs")
    assert backward.flops == 2.5 * found.flops
    wide = kernels.attention(*[torch.empty(1, 1, 16, 512, device="meta", dtype=torch.bfloat16)] * 3)
    assert (wide.kind, wide.bits) == ("wide attention", 16)  # FlashAttention takes heads of at most 256
    assert H100.rate("wide attention", 16) < H100.rate("attention", 16)
    assert H100.rate("wide attention", 32) == H100.rate("attention", 32)


@pytest.mark.parametrize(("precision", "bits"), [("mixed", 16), ("fp32", 32)])
def test_a_gpu_decodes_with_attention_in_16_bits(tiny_sdxl: Path, precision: str, bits: int) -> None:
    models = {**tiny.recipe_dict(tiny_sdxl, Path("/nowhere"))["models"], "vae_precision": precision}
    found = networks_of(Recipe.model_validate(tiny.recipe_dict(tiny_sdxl, Path("/nowhere"), models=models))).decoder()
    kinds = {(kernel.kind, kernel.bits) for kernel in found.kernels()}
    assert ("attention", bits) in kinds
    assert ("convolution", 32) in kinds


@pytest.fixture
def recipe(tiny_sdxl: Path) -> Recipe:
    return Recipe.model_validate(tiny.recipe_dict(tiny_sdxl, Path("/nowhere"), algorithm={"rewards": []}))


def test_derived_gradients_are_those_of_autograd(recipe: Recipe) -> None:
    """Products of a whole UNet, and within a third what its other operators move."""
    counted = networks_of(recipe).network()
    forward = counted.kernels()
    derived = forward + kernels.of_pass(forward, "inputs") + kernels.of_pass(forward, "weights")
    module = counted.build().to(memory_format=torch.channels_last)
    with counting._Counter(module) as counter:
        counted.call(module)[1].sum().backward()

    def flops(found: kernels.Kernels) -> int:
        return sum(count * k.flops for k, count in found.items() if k.kind != "attention")

    def moved(found: kernels.Kernels) -> int:
        return sum(count * k.moved for k, count in found.items() if k.kind == "memory")

    assert flops(forward) == counted.flops() - sum(c * k.flops for k, c in forward.items() if k.kind == "attention")
    assert flops(derived) == pytest.approx(flops(counter.kernels), rel=0.1)  # keys of the text want no gradient
    assert moved(derived) == pytest.approx(moved(counter.kernels), rel=0.35)


def test_a_kernel_takes_its_arithmetic_its_traffic_or_its_launch(recipe: Recipe) -> None:
    speed = Roofline(H100, networks_of(recipe), H100.links())
    product = Kernel("matmul", 16, 10**12, 10**6, 10**6)
    assert speed._seconds(product, 2) == pytest.approx(2e12 / (989e12 * MATMUL))
    mover = Kernel("memory", 16, 0, 10**9, 0)
    assert speed._seconds(mover, 3) == pytest.approx(3e9 / (MEMORY * 3.35e12))
    assert speed._seconds(Kernel("memory", 16, 0, 10, 0), 1) == SHORTEST
    # The tiny network is nothing but launches: a batch costs what one image does.
    count = sum(speed.networks.network().kernels().values())
    assert speed.passes("network", 1).forward == speed.passes("network", 4).forward == pytest.approx(LAUNCH * count)


def test_sdxl_on_an_a100_takes_what_others_measured() -> None:
    """30 guided steps at 1024 px, eager bf16 with fused attention on an A100 of 80 GB: 3.31 s, of which text and
    decoder are some 0.2 (docs of diffusers, "Accelerate inference")."""
    sdxl = "stabilityai/stable-diffusion-xl-base-1.0"
    data = {"steps": 1, "models": {"reference": sdxl, "generator": sdxl}, "data": {"prompts": "p"}}
    networks = networks_of(Recipe.model_validate({**data, "optimization": {"precision": "bf16"}}))
    device = DEVICES["a100-80gb"]
    predicted = 30 * Roofline(device, networks, device.links()).passes("network", 2).forward
    assert predicted == pytest.approx(3.1, rel=0.05)
