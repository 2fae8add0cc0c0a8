"""rlhf-t2i: distributed RLHF for one- and few-step text-to-image generators (Diff-Instruct* and its relatives).

The public API is below; docs/python.md shows each name in use. Importing this package imports no torch: a name is
loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rlhf_t2i.algorithm.losses import assistant_loss, divergence_loss, implicit_cfg_loss
    from rlhf_t2i.algorithm.schedules import FlowSchedule, Schedule, VPSchedule
    from rlhf_t2i.api import TrainResult, divergence, evaluate, load, plan, reward, train
    from rlhf_t2i.errors import RunError, UsageError
    from rlhf_t2i.evaluation.models import ImageModel
    from rlhf_t2i.evaluation.results import Results
    from rlhf_t2i.evaluation.scorer import Scorer

__version__ = "0.1.0"
__all__ = [
    "FlowSchedule", "ImageModel", "Results", "RunError", "Schedule", "Scorer", "TrainResult", "UsageError",
    "VPSchedule", "assistant_loss", "divergence", "divergence_loss", "evaluate", "implicit_cfg_loss", "load", "plan",
    "reward", "train",
]  # fmt: skip

_MODULES: Final = {
    "rlhf_t2i.algorithm.losses": ("assistant_loss", "divergence_loss", "implicit_cfg_loss"),
    "rlhf_t2i.algorithm.schedules": ("FlowSchedule", "Schedule", "VPSchedule"),
    "rlhf_t2i.api": ("TrainResult", "divergence", "evaluate", "load", "plan", "reward", "train"),
    "rlhf_t2i.errors": ("RunError", "UsageError"),
    "rlhf_t2i.evaluation.models": ("ImageModel",),
    "rlhf_t2i.evaluation.results": ("Results",),
    "rlhf_t2i.evaluation.scorer": ("Scorer",),
}


if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> object:
        module = next((module for module, names in _MODULES.items() if name in names), None)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(import_module(module), name)
        globals()[name] = value  # the next access is a plain one
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
