"""Plugin API: base classes of rewards and divergences, the registry, preprocessing and the scaffold.

The shipped plugins are in the repository's top-level ``plugins/``. Importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_t2i.plugins.base import (
        Divergence,
        Footprint,
        LatentContext,
        LatentReward,
        Options,
        Reward,
        shared,
        sharing,
    )

__all__ = ["Divergence", "Footprint", "LatentContext", "LatentReward", "Options", "Reward", "shared", "sharing"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from rlhf_t2i.plugins import base

        return getattr(base, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
