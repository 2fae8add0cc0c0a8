"""torch.compile of the networks, block by block (``optimization.compile``).

Blocks of one kind share their compiled code, so that it takes minutes where a whole network would take
many, and what lies between them (activation checkpointing, adapters, ZeRO's hooks) is unchanged.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection

from torch import nn

from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils import files

_VARIANTS = 256
"""Shapes, precisions and gradient modes of one kind of block; torch gives up compiling after 8."""


def _keep_compiled() -> None:
    """Keep compiled code for later runs and other processes, by graph and versions of torch, in a private folder.

    torch's default is a folder of a known name in the temporary folder, where others may put files before, and which
    batch systems empty after every job.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    cache = files.expanded(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "rlhf-t2i" / "inductor"
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"optimization.compile: the cache {cache} cannot be made ({error.strerror}): set TORCHINDUCTOR_CACHE_DIR"
        ) from None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)


def compile_blocks(network: nn.Module, names: Collection[str]) -> None:
    """Compile blocks when they are first run, in place; the names of weights stay.

    Args:
        network: A denoiser or a decoder.
        names: Class names of its repeated blocks.

    Raises:
        UsageError: No C++ compiler is here, which torch.compile needs on GPUs, too; the cache cannot be made.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise UsageError("optimization.compile: no C++ compiler is here: install g++, or set compile to false")
    _keep_compiled()
    import torch._dynamo

    torch._dynamo.config.recompile_limit = _VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = 8 * _VARIANTS
    for module in network.modules():
        if type(module).__name__ in names:
            module.compile(dynamic=False)
