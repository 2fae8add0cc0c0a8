"""Accelerators a plan can be made for."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe.schema import Recipe

ACHIEVED = 0.45
"""Assumed share of the peak that a step's matrix products reach; nothing here was measured on a GPU yet."""

USABLE = 0.9
"""Share of a device's memory a plan may fill: the CUDA context, workspaces and fragmentation take the rest."""

HERE = "here"
"""The name that stands for this machine, whose rates are measured."""


@dataclass(frozen=True)
class Rates:
    """Model FLOPs a second that a device reaches in a recipe's precisions.

    Attributes:
        unet: In UNets and reward towers.
        decoder: In the VAE's decoder.
    """

    unet: float
    decoder: float


@dataclass(frozen=True)
class Device:
    """One accelerator, from its maker's data sheet.

    Attributes:
        memory: GiB that torch sees.
        bf16: Peak dense FLOP/s in bfloat16, without sparsity.
    """

    memory: float
    bf16: float

    def rates(self, recipe: Recipe) -> Rates | None:
        """Assumed rates; None in fp32, whose rate depends on switches the recipe does not have."""
        if recipe.optimization.precision != "bf16":
            return None
        reached = self.bf16 * ACHIEVED
        # A decoder in float32, whose convolutions take TF32, has half the rate of bf16 on every device of the table.
        return Rates(reached, reached if recipe.models.vae_precision == "bf16" else reached / 2)


DEVICES = {
    "h100-80gb": Device(79.1, 989e12),
    "h200-141gb": Device(139.8, 989e12),
    "a100-80gb": Device(79.1, 312e12),
    "a100-40gb": Device(39.4, 312e12),
    "l40s-48gb": Device(44.5, 362e12),
}


def named(name: str) -> Device:
    """A device by name.

    Raises:
        UsageError: It is not in the table.
    """
    if name not in DEVICES:
        raise UsageError(f"--device {name}: unknown; known: {', '.join(DEVICES)}, and {HERE} to measure this machine")
    return DEVICES[name]
