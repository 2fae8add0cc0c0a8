"""What an export chooses so that a plain pipeline call draws the student's steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ExportScheduler:
    """A scheduler, and the arguments that a pipeline call needs besides ``num_inference_steps``; usually none."""

    scheduler: Any
    arguments: dict[str, Any] = field(default_factory=dict)
