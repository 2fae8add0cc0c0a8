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
    from rlhf_t2i.plugins.online import Lesson, OnlineReward, Schedule

_ONLINE = ("Lesson", "OnlineReward", "Schedule")
__all__ = [
    "Divergence", "Footprint", "LatentContext", "LatentReward", "Lesson", "OnlineReward", "Options", "Reward",
    "Schedule", "shared", "sharing",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in __all__:
        from rlhf_t2i.plugins import base, online

        return getattr(online if name in _ONLINE else base, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
