"""torch.compile of the networks, block by block (``optimization.compile``).

Blocks of one kind share their compiled code, so that it takes minutes where a whole UNet would take many, and what lies
between them (activation checkpointing, adapters, ZeRO's hooks) goes on as without.
"""

from __future__ import annotations

import os
import shutil

from torch import nn

from rlhf_t2i.errors import UsageError

BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock")
"""Class names in diffusers, of UNets and of the VAE."""

_VARIANTS = 256
"""Shapes, precisions and gradient modes of one kind of block; torch gives up compiling after 8."""


def compile_blocks(network: nn.Module) -> None:
    """Compile the blocks of a UNet or a VAE when they are first run, in place; names of weights stay.

    Raises:
        UsageError: No C++ compiler is here, which torch.compile needs on GPUs, too.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise UsageError("optimization.compile: no C++ compiler is here: install g++, or set compile to false")
    import torch._dynamo

    torch._dynamo.config.recompile_limit = _VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = 8 * _VARIANTS
    for module in network.modules():
        if type(module).__name__ in BLOCKS:
            module.compile(dynamic=False)
