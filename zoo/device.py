"""Where the zoo computes: on the GPU if there is one, else on the CPU; ``ZOO_DEVICE`` overrides.

On a CPU every random number is drawn as it always was. On CUDA a generator of the device, seeded alike, draws there:
drawing on the host would limit the training. The numbers differ, their distribution does not.
"""

from __future__ import annotations

import argparse
import os

import torch
from torch import Tensor

DEVICE = torch.device(os.environ.get("ZOO_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


def on_cuda() -> bool:
    """Whether the zoo computes on a GPU of NVIDIA."""
    return DEVICE.type == "cuda"


def cpu_only(parser: argparse.ArgumentParser) -> None:
    """End a command that nobody has made fit for a GPU, where there is one."""
    if DEVICE.type != "cpu":
        parser.error(f"it runs on a CPU only, and the device is {DEVICE}: set ZOO_DEVICE=cpu")


def autocast() -> torch.autocast:
    """Matrix products and convolutions in bfloat16."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


def here(tensor: Tensor) -> Tensor:
    """The tensor on the device."""
    return tensor.to(DEVICE, non_blocking=True)


def generator(seed: int) -> torch.Generator:
    """A source of random numbers: of the GPU, or of the CPU."""
    return torch.Generator(DEVICE if on_cuda() else "cpu").manual_seed(seed)


def rand(*shape: int, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), drawn where the generator is, on the device."""
    return here(torch.rand(shape, generator=generator, device=generator.device))


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    """Standard normal, drawn where the generator is, on the device."""
    return here(torch.randn(shape, generator=generator, device=generator.device))


def randint(high: int, size: int, generator: torch.Generator) -> Tensor:
    """Integers [size] in [0, high), drawn where the generator is, on the device."""
    return here(torch.randint(high, (size,), generator=generator, device=generator.device))


def randperm(size: int, generator: torch.Generator) -> Tensor:
    """A permutation of [0, size), drawn where the generator is, on the device."""
    return here(torch.randperm(size, generator=generator, device=generator.device))


def integer(low: int, high: int, generator: torch.Generator) -> int:
    """One integer in [low, high) for the host, which never waits for the GPU: it draws its own, by the same seed."""
    if generator.device.type != "cpu":
        generator = torch.Generator().manual_seed(generator.initial_seed())
    return int(torch.randint(low, high, (1,), generator=generator))
