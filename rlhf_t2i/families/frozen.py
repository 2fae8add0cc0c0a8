"""Frozen weights: several networks on one copy of them, and convolutions that keep no input for the backward pass.

The gradient in the input of a linear layer or convolution needs the weights alone. PyTorch keeps a convolution's input
all the same, even where its weights want no gradient: a third of what SDXL's decoder holds.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional


def freeze_convs(network: nn.Module) -> nn.Module:
    """Freeze a network's weights and let its two-dimensional convolutions forget their inputs; in place.

    Outputs and gradients are those of the network before. The weights must stay frozen.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros":
            module.__class__ = FrozenConv2d
    return network.eval().requires_grad_(False)


def twin(network: nn.Module) -> nn.Module:
    """A network of its own modules and buffers on the same weights, which must stay frozen."""
    weights = {id(p): nn.Parameter(p.data, requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, weights)


class FrozenConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` for the gradient in its input only."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _Convolution.apply(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: object) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = x.shape, settings
        return functional.conv2d(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return torch.nn.grad.conv2d_input(ctx.shape, weight, gradients[0], *ctx.settings), *[None] * 6
