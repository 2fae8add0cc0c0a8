"""What the roles with a trained network share: its state, and the report of an update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from rlhf_t2i.engines.base import Engine
from rlhf_t2i.engines.writer import Writer

Samples = dict[str, list[float]]
"""Per-sample measurements of a step; the controller averages them over all ranks."""
Measured = dict[str, list[Tensor]]
"""The same while the step runs: [B] of every micro-batch, on the device. See :func:`read`."""


@dataclass(frozen=True)
class Update:
    """One rank's report of an update.

    Attributes:
        grad_norm: The gradient norm over all ranks before clipping; infinite if the update was skipped.
        loss: The assistant's mean loss on this rank.
        samples: The learner's measurements of this rank's samples.
        bad: This rank's prompts whose gradient at x_0 was not finite.
    """

    grad_norm: float
    loss: float = 0.0
    samples: Samples = field(default_factory=dict)
    bad: tuple[str, ...] = ()


class TrainedRole:
    """A role with an engine; every rank must make each of these calls."""

    engine: Engine

    def bf16_drift(self) -> dict[str, float]:
        """What bf16 loses against the masters; see :meth:`Engine.bf16_drift`."""
        return self.engine.bf16_drift()

    @cached_property
    def writer(self) -> Writer:
        """Writes the role's files while it goes on training."""
        return Writer()

    def save(self, folder: str) -> None:
        """Copy this rank's training state, to be written into an existing folder; see :meth:`finish_saving`."""
        self.engine.save(Path(folder), self.writer)

    def finish_saving(self) -> None:
        """Wait until the state is written, while the role trains in another thread; raises what the writing raised."""
        self.writer.wait()

    def load(self, folder: str) -> str | None:
        """Restore it; returns None if bit for bit, otherwise a message that says why not."""
        self.finish_saving()
        return self.engine.load(Path(folder))


def read(measured: Mapping[str, list[Tensor]]) -> Samples:
    """All measurements in one transfer: every read of a tensor waits for the device."""
    if not measured:
        return {}
    flat = torch.cat([values.float() for parts in measured.values() for values in parts]).cpu().tolist()
    samples: Samples = {}
    for name, parts in measured.items():
        count = sum(map(len, parts))
        samples[name], flat = flat[:count], flat[count:]
    return samples
