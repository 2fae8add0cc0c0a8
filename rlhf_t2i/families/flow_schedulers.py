"""The diffusers scheduler with which a plain pipeline draws a flow-matching student's own steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from rlhf_t2i.algorithm.schedules import FlowSchedule
from rlhf_t2i.algorithm.student import Student
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families.exported import ExportScheduler


def dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """The timestep shift for an image of so many tokens, as the scheduler's configuration gives it.

    With ``use_dynamic_shifting`` it is ``exp(mu)`` for a mu that is linear in the number of tokens (FLUX).
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    keys = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    return math.exp(calculate_shift(tokens, *(config.get(key, default) for key, default in keys.items())))


def even_timesteps(steps: int) -> tuple[float, ...]:
    """K even steps from pure noise, ``1000 (K - k + 1) / K``: 1000, 750, 500, 250 for four."""
    return tuple(1000 * (steps - i) / steps for i in range(steps))


def export_scheduler(student: Student) -> ExportScheduler:
    """Choose the scheduler of an exported pipeline.

    The pipelines spread ``num_inference_steps`` evenly from 1 to nearly 0; ``shift_terminal`` ends them at the
    student's last step instead. Steps that are not even are passed to the pipeline as ``sigmas``.

    Raises:
        UsageError: A student that does not start from pure noise, as every flow-matching pipeline does.
    """
    import diffusers

    assert isinstance(student.schedule, FlowSchedule)
    if student.timesteps[0] != 1000:
        raise UsageError(
            f"student.timesteps: a flow-matching pipeline starts at 1000 (pure noise), not at {student.timesteps[0]:g}"
        )
    stochastic = student.transition == "stochastic"
    cls = diffusers.FlowMatchLCMScheduler if stochastic else diffusers.FlowMatchEulerDiscreteScheduler
    # For one step the terminal value would be the start itself.
    terminal = student.timesteps[-1] / 1000 if student.steps > 1 else None
    even: Any = cls(shift=1.0, shift_terminal=terminal)
    even.set_timesteps(student.steps)
    wanted = torch.tensor(student.timesteps, dtype=torch.float64)
    if torch.allclose(even.timesteps.double(), wanted, rtol=0, atol=1e-2):
        return ExportScheduler(cls(shift=1.0, shift_terminal=terminal))
    return ExportScheduler(cls(shift=1.0), {"sigmas": [tau / 1000 for tau in student.timesteps]})
