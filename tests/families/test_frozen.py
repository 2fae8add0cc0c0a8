"""Frozen networks: the same numbers, without the inputs of convolutions in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rlhf_t2i.families.frozen import FrozenConv2d, freeze_convs


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False), nn.SiLU(),
        nn.Conv2d(6, 6, 3, dilation=2, groups=3), nn.Conv2d(6, 2, 1),
    )  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_the_same(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    plain = network().to(dtype=dtype, memory_format=memory_format).requires_grad_(False)
    frozen = freeze_convs(copy.deepcopy(plain))
    assert sum(isinstance(module, FrozenConv2d) for module in frozen) == 4
    assert plain.state_dict().keys() == frozen.state_dict().keys()
    x = torch.randn(2, 4, 16, 16).to(dtype=dtype, memory_format=memory_format)
    found = []
    for net in (plain, frozen):
        leaf = x.clone().requires_grad_(True)
        output = net(leaf)
        found.append((output.detach(), *torch.autograd.grad(output.float().square().sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert float(found[0][1].norm()) > 0


def test_inputs_of_convolutions_are_not_kept() -> None:
    """The SiLUs keep their inputs; a plain convolution would keep their outputs besides."""
    net = freeze_convs(network())
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(torch.randn(1, 4, 16, 16, requires_grad=True))
    assert [tuple(tensor.shape) for tensor in kept] == [(1, 8, 16, 16), (1, 6, 8, 8)]
