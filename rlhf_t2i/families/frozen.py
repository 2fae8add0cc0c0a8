"""Frozen weights: several networks on one copy, convolutions that keep no input for the backward pass, bf16 attention.

The gradient in the input of a linear layer or convolution needs the weights alone. PyTorch keeps a convolution's input
all the same, even where its weights want no gradient: a third of what SDXL's decoder holds.
"""

from __future__ import annotations

import copy
from collections.abc import Collection

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


def halve_attention(network: nn.Module, names: Collection[str]) -> nn.Module:
    """Let attention layers compute products in bf16, between norms and a sum in the network's own dtype; in place.

    Their weights stay as they are. In bf16 torch's fused kernels run on tensor cores; in float32 one attention is a
    third of the time of SDXL's decoder at 1024 px.

    Args:
        network: A frozen network.
        names: Class names of the layers, which have diffusers' ``to_q``, ``to_k``, ``to_v`` and ``to_out``.
    """
    for module in network.modules():
        if type(module).__name__ in names:
            for layer in (module.to_q, module.to_k, module.to_v, module.to_out[0]):
                layer.__class__ = HalfLinear
    return network


class HalfLinear(nn.Linear):
    """An ``nn.Linear`` with weights of any dtype that computes, and returns, bf16."""

    def forward(self, input: Tensor) -> Tensor:
        """The product; the gradient comes back in the input's dtype."""
        bias = None if self.bias is None else self.bias.bfloat16()
        return functional.linear(input.bfloat16(), self.weight.bfloat16(), bias)


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
