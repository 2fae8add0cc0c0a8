"""Activations: the peak counted on the meta device is what a real forward and backward allocate."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from rlhf_t2i.families import activations, published
from rlhf_t2i.families.frozen import freeze_convs
from tests import tiny


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_meta_count_is_what_a_real_backward_needs(train: bool, recompute: bool) -> None:
    """Tensors that live are those of the count; convolutions on a CPU borrow more while they run, never less."""
    network = tiny.sdxl_unet()
    if not train:
        freeze_convs(network).to(memory_format=torch.channels_last)
    if recompute:
        network.enable_gradient_checkpointing()
    network.train()
    cond = {"text_embeds": torch.randn(1, tiny.WIDTH), "time_ids": torch.zeros(1, 6)}

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(1, *tiny.LATENTS, requires_grad=True)
        latents = x.contiguous(memory_format=torch.channels_last)
        embeds = torch.randn(1, 77, 2 * tiny.WIDTH)
        return x, network(latents, torch.tensor([399]), embeds, added_cond_kwargs=cond, return_dict=False)[0]

    config = {**network.config, "_class_name": "UNet2DConditionModel"}
    counted = activations.unet(config, tiny.LATENTS[1], torch.float32, train)
    assert counted.checkpointed < counted.plain
    expected = counted.checkpointed if recompute else counted.plain
    assert activations.peak(network, call) == pytest.approx(expected, rel=0.03)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        x, output = call()
        torch.autograd.grad(output, x, torch.ones_like(output))
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert max(itertools.accumulate(sizes)) > 0.97 * expected


def test_a_gradient_s_own_tensors_are_counted() -> None:
    """A product of two layers: both activations are kept, then each gradient lives beside what is still needed."""
    with torch.device("meta"):
        layers = torch.nn.Sequential(torch.nn.Linear(100, 1000), torch.nn.ReLU(), torch.nn.Linear(1000, 10))

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.empty(1, 100, requires_grad=True, device="meta")
        return x, layers(x)

    # The last layer's gradient in its input (4000 bytes) beside the kept output of the ReLU, then the ReLU's own.
    assert activations.peak(layers, call) == pytest.approx(3 * 4000, rel=0.2)
    # Without a backward the first layer's output is gone when the ReLU's is used.
    assert activations.peak(layers, call, gradient=False) == pytest.approx(2 * 4000, rel=0.1)


def test_frozen_networks_keep_less_and_bf16_half() -> None:
    config = {**tiny.sdxl_unet().config, "_class_name": "UNet2DConditionModel"}
    full = activations.unet(config, 8, torch.float32, train=True)
    assert activations.unet(config, 8, torch.float32, train=False).plain < full.plain
    half = activations.unet(config, 8, torch.bfloat16, train=True)
    assert half.plain == pytest.approx(full.plain / 2, rel=0.05)
    larger = activations.unet(config, 16, torch.float32, train=True)
    assert larger.plain == pytest.approx(4 * full.plain, rel=0.15), "about proportional to the pixels"


@pytest.mark.parametrize(
    ("family", "config"),
    [
        pytest.param("sdxl", published.SDXL_UNET, marks=pytest.mark.slow),
        ("sd15", published.SD15_UNET),
    ],
)
@pytest.mark.parametrize("kind", ["train", "frozen"])
def test_written_counts_are_current(family: str, config: dict, kind: str) -> None:
    """Within two per cent: other releases of diffusers may need a little more or less."""
    fresh = activations.unet(config, config["sample_size"], torch.bfloat16, kind == "train")
    written = activations.COUNTED[family, kind]
    assert fresh.plain == pytest.approx(written.plain, rel=0.02)
    assert fresh.checkpointed == pytest.approx(written.checkpointed, rel=0.02)
    found = activations.of_recipe(copy.deepcopy(config), None, config["sample_size"] // 2, "fp32")[kind]
    assert found.plain == pytest.approx(written.plain / 4 * 2, rel=1e-6)
