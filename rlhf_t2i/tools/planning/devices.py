"""Accelerators that a plan can be made for. Imports no torch: a wrong name is refused at once."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe.schema import Recipe

ACHIEVED = 0.45
"""Assumed share of the peak that a step's matrix products reach; not measured on a GPU yet."""

ACHIEVED_LINK = 0.7
"""Assumed share of the link's peak that collectives reach."""

USABLE = 0.9
"""Share of a device's memory a plan may fill: the CUDA context, workspaces and fragmentation take the rest."""

HERE = "here"
"""The name that stands for this machine, whose rates are measured."""


@dataclass(frozen=True)
class Rates:
    """What a device reaches in a recipe's precisions.

    Attributes:
        network: Model FLOPs per second of the denoising network and of rewards.
        decoder: Model FLOPs per second of the decoder.
        link: Bytes per second that a device sends to its neighbors in a collective; None: traffic is not counted.
    """

    network: float
    decoder: float
    link: float | None = None


@dataclass(frozen=True)
class Device:
    """One accelerator, from its maker's data sheet.

    Attributes:
        memory: GiB that torch sees.
        bf16: Peak dense FLOP/s in bfloat16, without sparsity.
        fp32: Peak FLOP/s in float32 outside the tensor cores.
        link: Peak bytes per second in one direction between devices of a machine (NVLink; PCIe where there is none).
    """

    memory: float
    bf16: float
    fp32: float
    link: float

    def rates(self, recipe: Recipe) -> Rates:
        """Assumed rates."""
        bf16, fp32 = self.bf16 * ACHIEVED, self.fp32 * ACHIEVED
        # A decoder in float32 is mostly convolutions, which take TF32: half the rate of bf16 on all these devices.
        decoder = bf16 if recipe.models.vae_precision == "bf16" else bf16 / 2
        return Rates(bf16 if recipe.optimization.precision == "bf16" else fp32, decoder, self.link * ACHIEVED_LINK)


DEVICES = {
    "h100-80gb": Device(79.1, 989e12, 67e12, 450e9),
    "h200-141gb": Device(139.8, 989e12, 67e12, 450e9),
    "a100-80gb": Device(79.1, 312e12, 19.5e12, 300e9),
    "a100-40gb": Device(39.4, 312e12, 19.5e12, 300e9),
    "l40s-48gb": Device(44.5, 362e12, 91.6e12, 32e9),
}


def find(name: str) -> tuple[str, Device | None]:
    """(full name, device) by a name or its beginning: ``h100`` is ``h100-80gb``. :data:`HERE` has no device.

    Raises:
        UsageError: Unknown; the sentence names the nearest known one.
    """
    wanted = name.strip().lower()
    if wanted == HERE:
        return HERE, None
    full = next((known for known in DEVICES if known == wanted or known.startswith(f"{wanted}-")), None)
    if full is None:
        short = {known.partition("-")[0] for known in DEVICES}
        near = difflib.get_close_matches(wanted, [*DEVICES, *sorted(short), HERE], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"--device {name}: unknown; {hint}Known: {', '.join(DEVICES)}, and {HERE} for this machine")
    return full, DEVICES[full]
