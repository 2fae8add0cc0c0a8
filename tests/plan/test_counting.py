"""Counts on the meta device are what real forwards and backwards need, for any network."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_t2i.families import counting, sources
from rlhf_t2i.families.frozen import freeze_convs
from rlhf_t2i.families.recomputing import checkpoint_layers
from rlhf_t2i.plugins import registry
from tests import tiny


def counted(build: Any, shape: tuple[int, ...], name: str) -> counting.Network:
    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return build()

    def call(network: nn.Module) -> tuple[Tensor, Tensor]:
        x = torch.empty(1, *shape, requires_grad=True, device="meta")
        return x, network(x)

    return counting.Network((name,), on_meta, call)


def real_peak(call: Any) -> int:
    """Peak bytes that a CPU allocates in a forward and the backward to its input."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        x, output = call()
        torch.autograd.grad(output, x, torch.ones_like(output))
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_meta_count_is_what_a_real_backward_needs(frozen: bool, recompute: bool) -> None:
    """Tensors that live are those of the count; convolutions on a CPU borrow more while they run, never less."""

    def call(network: Any, device: str = "cpu") -> tuple[Tensor, Tensor]:
        with torch.device(device):
            x = torch.randn(1, *tiny.LATENTS, requires_grad=True)
            cond = {"text_embeds": torch.randn(1, tiny.WIDTH), "time_ids": torch.zeros(1, 6)}
            inputs = x.contiguous(memory_format=torch.channels_last), torch.tensor([399.0])
            embeds = torch.randn(1, 77, 2 * tiny.WIDTH)
            return x, network(*inputs, embeds, added_cond_kwargs=cond, return_dict=False)[0]

    def on_meta() -> nn.Module:
        return tiny.sdxl_unet().to("meta")

    def diffusers_way(network: Any) -> None:
        network.enable_gradient_checkpointing()
        network.train()

    mode: counting.Mode = "input" if frozen else "train"
    key = ("a real backward", frozen, recompute)
    network = counting.Network(key, on_meta, lambda net: call(net, "meta"), diffusers_way)
    expected = network.activations(mode, recompute)
    real = tiny.sdxl_unet()
    if frozen:
        freeze_convs(real).to(memory_format=torch.channels_last)
    if recompute:
        diffusers_way(real)
        assert expected < network.activations(mode)
    assert counting.peak(real, lambda: call(real)) == pytest.approx(expected, rel=0.03)
    assert real_peak(lambda: call(real)) > 0.97 * expected
    assert network.parameters() == sum(network.sizes()) == sum(p.numel() for p in real.parameters())


def test_gradients_of_activations_are_counted() -> None:
    """A product of two layers: both activations are kept, then each gradient lives beside what is still needed."""
    network = counted(
        lambda: nn.Sequential(nn.Linear(100, 1000), nn.ReLU(), nn.Linear(1000, 10)), (100,), "two products"
    )
    # The last layer's gradient in its input (4000 bytes) beside the kept output of the ReLU, then the ReLU's own.
    assert network.activations("train") == pytest.approx(3 * 4000, rel=0.2)
    # Without a backward the first layer's output is gone when the ReLU's is used.
    assert network.activations("forward") == pytest.approx(2 * 4000, rel=0.1)
    assert network.flops() == 2 * (100 * 1000 + 1000 * 10)


class Blocks(nn.Module):
    """Convolutions in a list with an empty place, as diffusers makes for blocks without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU()) * 4) for _ in range(4)])
        self.attentions = nn.ModuleList([None, None])  # type: ignore[list-item]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_layers_are_recomputed_where_a_list_holds_none() -> None:
    plain = Blocks()
    again = Blocks()
    again.load_state_dict(plain.state_dict())
    checkpoint_layers(again)
    x = torch.randn(1, 8, 16, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(plain(x).sum(), x)
    (found,) = torch.autograd.grad(again(x).sum(), x)
    assert torch.equal(found, expected)
    network = counted(Blocks, (8, 16, 16), "blocks")
    assert network.activations("train", recomputed=True) < network.activations("train")
    assert network.activations("input") < network.activations("train")  # frozen convolutions keep no input


def test_counts_are_proportional_to_the_batch() -> None:
    """Plans count one sample and multiply: samples do not mix."""
    network = Blocks().to("meta")

    def peak(batch: int) -> int:
        def call() -> tuple[Tensor, Tensor]:
            x = torch.empty(batch, 8, 16, 16, requires_grad=True, device="meta")
            return x, network(x)

        return counting.peak(network, call)

    assert peak(5) == 5 * peak(1)


def footprint(name: str, **options: Any) -> counting.Network:
    """A shipped reward's footprint at 64 px."""
    cls = registry.load_class(registry.REWARDS, name)
    found = cls.footprint(cls.Options(**options))
    assert found is not None
    return counted(found.build, (3, 64, 64), f"{name} {options}")


def test_a_reward_s_footprint_is_its_network(tiny_clip: Path) -> None:
    reward = registry.reward("pickscore", model=str(tiny_clip))
    network = footprint("pickscore", model=str(tiny_clip))
    assert network.parameters() == sum(p.numel() for p in reward.parameters())
    images = torch.empty(1, 3, 64, 64, device="meta")
    assert network.flops() == counting.flops(lambda: reward.to("meta").clip.image_features(images)) > 0
    assert 0 < network.activations("forward") < network.activations("input")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("pickscore", 986_109_441),
        ("hpsv2", 986_109_441),
        ("hpsv3", 7_748_610_610),
        ("vlm_choice", 8_291_375_616),
        ("clip", 427_616_513),
        ("aesthetic", 428_544_482),
        ("image_reward", 446_206_689),
    ],
)
def test_published_rewards_are_counted_without_a_network(name: str, parameters: int) -> None:
    assert footprint(name).parameters() == parameters


def test_a_remote_scorer_costs_nothing_here() -> None:
    network = footprint("http", url="http://127.0.0.1:1/score")
    assert (network.parameters(), network.flops()) == (0, 0)


def test_shipped_configurations_are_read_like_local_ones(tmp_path: Path) -> None:
    source = sources.parse("stabilityai/stable-diffusion-xl-base-1.0")
    assert sources.read_json(source, "unet/config.json")["cross_attention_dim"] == 2048
    assert sources.pipeline_index(source)["_class_name"] == "StableDiffusionXLPipeline"
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"sample_size": 7}))
    assert sources.read_json(sources.parse(str(tmp_path)), "unet/config.json") == {"sample_size": 7}
