"""The interface of training engines, and what both share: learning rate and optimizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from rlhf_t2i.engines.writer import Writer
from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe.schema import Optimizer


class Engine(Protocol):
    """Trains a network: forward, backward, update, save and load."""

    module: nn.Module

    def __call__(self, *args: object, **kwargs: object) -> Sequence[Tensor]:
        """Forward with training hooks."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's mean loss."""

    def step(self, learning_rate: float) -> float:
        """Update after the last micro-batch.

        Returns:
            The gradient norm over all ranks before clipping; infinite if it is not finite: then no rank updates.
        """

    def full_parameters(self, adapted: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Every parameter gathered, adapters merged, in float32 on the device; all ranks must iterate together.

        Args:
            adapted: Only the weights of layers with adapters.
        """

    def copies(self, part: int = 0, parts: int = 1) -> Iterator[tuple[str, Tensor]]:
        """The trained parameters whole, as the network computes with them; all ranks must iterate together.

        Args:
            part: Which of ``parts`` equal numbers of parameters, in the network's order.
            parts: How many.
        """

    def masters(self) -> list[Tensor]:
        """This rank's share of the trained float32 weights, in the engine's own layout; in place, without a graph."""

    def set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Replace a trained parameter in the masters by a whole one; its copies in the network stay as they are."""

    def adapter_factors(self) -> Iterator[tuple[str, Tensor]]:
        """Adapters alone, see :func:`rlhf_t2i.families.adapters.factors`; all ranks must iterate together."""

    def bf16_drift(self) -> dict[str, float]:
        """Drift of the bf16 copies from their float32 masters, {} under fp32; all ranks must call it together."""

    def save(self, folder: Path, writer: Writer) -> None:
        """Write this rank's share of the state into an existing folder; the files are whole after ``writer.wait()``."""

    def load(self, folder: Path) -> str | None:
        """Restore what :meth:`save` wrote; returns None if bit for bit, otherwise a message that says why not."""


def trained(module: nn.Module, part: int = 0, parts: int = 1) -> list[tuple[str, nn.Parameter]]:
    """The trained parameters of a network by name, or one of ``parts`` equal numbers of them."""
    found = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    return found[part * len(found) // parts : (part + 1) * len(found) // parts]


def learning_rate(optimizer: Optimizer, step: int) -> float:
    """Linear warm-up to a constant; ``step`` counts from 0."""
    if optimizer.warmup_steps == 0:
        return optimizer.lr
    return optimizer.lr * min(1.0, (step + 1) / optimizer.warmup_steps)


def adamw(parameters: Sequence[nn.Parameter], optimizer: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of both engines. Fused: on ZeRO's flat partition the unfused loop is 20 times slower.

    Raises:
        UsageError: 8-bit states without bitsandbytes or without a GPU.
    """
    settings = optimizer.model_dump(include={"lr", "eps", "weight_decay"}) | {"betas": tuple(optimizer.betas)}
    if optimizer.kind == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    check_eight_bit()
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def check_eight_bit() -> None:
    """Check that ``kind: adamw_8bit`` can run here.

    Raises:
        UsageError: bitsandbytes is not installed, or there is no GPU.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            "optimization: kind adamw_8bit needs bitsandbytes: pip install 'rlhf-t2i[8bit]', or set kind to adamw"
        )
    if not torch.cuda.is_available():
        raise UsageError("optimization: kind adamw_8bit needs an NVIDIA GPU and there is none: set kind to adamw")
