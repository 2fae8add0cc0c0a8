"""Adapters: a start that changes nothing, gradients in them alone, an exact merge, and sentences for wrong targets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import adapters
from rlhf_t2i.recipe.schema import Lora
from tests import tiny

SETTINGS = Lora(rank=4, alpha=8.0)
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def unet() -> nn.Module:
    torch.manual_seed(0)
    return tiny.sdxl_unet()


def call(network: Any, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, *tiny.LATENTS, generator=generator)
    text = torch.randn(2, 7, 2 * tiny.WIDTH, generator=generator)
    added = {"text_embeds": text[:, 0, : tiny.WIDTH], "time_ids": torch.full((2, 6), 16.0)}
    return network(x, torch.tensor([10, 700]), text, added_cond_kwargs=added).sample


def train_a_little(network: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        call(network).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().float()


def test_fresh_adapters_change_nothing() -> None:
    network = unet()
    with_adapters = copy.deepcopy(network)
    adapters.add(with_adapters, SETTINGS, TARGETS, seed=3)
    torch.testing.assert_close(call(with_adapters), call(network), rtol=0, atol=0)
    merged = dict(adapters.merged(with_adapters, whole))
    state = network.state_dict()
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[name], state[name]) for name in state)


def test_the_seed_sets_the_start_and_no_other_draw() -> None:
    one, same, other = (unet() for _ in range(3))
    before = torch.get_rng_state()
    for network, seed in ((one, 3), (same, 3), (other, 4)):
        adapters.add(network, SETTINGS, TARGETS, seed)
    assert torch.equal(torch.get_rng_state(), before)
    first = [name for name, _ in one.named_parameters() if ".lora_A." in name]
    assert first
    for name in first:
        assert torch.equal(one.get_parameter(name), same.get_parameter(name))
        assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


def test_only_adapters_are_trained() -> None:
    network = unet()
    adapters.add(network, SETTINGS, TARGETS, seed=0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    call(network).square().mean().backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None}
    assert trained == {name for name in before if ".lora_A." in name or ".lora_B." in name}
    assert adapters.frozen(network) == before.keys() - trained
    network.zero_grad()
    train_a_little(network)
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained


def test_the_merge_is_the_adapted_network() -> None:
    network, plain = unet(), unet()
    adapters.add(network, SETTINGS, TARGETS, seed=0)
    train_a_little(network)
    plain.load_state_dict(dict(adapters.merged(network, whole)), strict=True)
    assert float((call(plain) - call(unet())).detach().norm()) > 1e-2
    torch.testing.assert_close(call(plain), call(network), rtol=1e-5, atol=1e-6)


def test_wrong_targets_are_refused() -> None:
    with pytest.raises(UsageError, match="no layer 'to_queue'"):
        adapters.add(unet(), SETTINGS, ["to_queue"], seed=0)
    with pytest.raises(UsageError, match="'conv_in' is a Conv2d"):
        adapters.add(unet(), SETTINGS, ["conv_in"], seed=0)
