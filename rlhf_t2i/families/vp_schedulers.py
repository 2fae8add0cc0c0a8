"""The diffusers scheduler with which a plain pipeline draws a variance-preserving student's own steps.

``pipe(prompt, num_inference_steps=K, guidance_scale=0)`` must land on the student's timesteps without further
arguments. A scheduler of K evenly spaced steps starts at its last training timestep, so that the exported one is cut
off where the student starts: for one step at 399 its betas end at 399.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rlhf_t2i.algorithm.schedules import VPSchedule
from rlhf_t2i.algorithm.student import Student
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families.exported import ExportScheduler

_KEPT = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "trained_betas")


def export_scheduler(config: Mapping[str, Any], student: Student) -> ExportScheduler:
    """Choose the scheduler of an exported pipeline.

    Args:
        config: The reference's scheduler configuration.
        student: On a :class:`VPSchedule`.

    Raises:
        UsageError: Scaled noise with fresh noise between steps, which no scheduler of diffusers draws.
    """
    import diffusers

    schedule = student.schedule
    assert isinstance(schedule, VPSchedule)
    steps = [int(schedule.index(torch.tensor([tau]))[0]) for tau in student.timesteps]
    regular = _is_regular(steps)
    cut = steps[0] + 1 if regular else len(schedule)
    betas = {
        **_betas(config, schedule, cut),
        "prediction_type": schedule.prediction_type,
        "steps_offset": 1,  # unused by these spacings; other values make Stable Diffusion's pipeline warn
    }
    if student.input == "sigma":
        if student.steps > 1 and student.transition == "stochastic":
            raise UsageError("student.input: sigma with several steps needs student.transition: deterministic")
        if not regular:
            raise UsageError(f"student.timesteps {steps} are not evenly spaced: with input: sigma no export draws them")
        return ExportScheduler(diffusers.EulerDiscreteScheduler(**betas, timestep_spacing="trailing"))
    if student.transition == "deterministic" and student.steps > 1:
        scheduler = diffusers.DDIMScheduler(
            **betas, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
        )
        if not regular:
            raise UsageError(
                f"student.timesteps {steps} are not evenly spaced: with transition: deterministic no export draws them"
            )
        return ExportScheduler(scheduler)
    if regular:
        return ExportScheduler(diffusers.LCMScheduler(**betas, original_inference_steps=student.steps))
    return ExportScheduler(diffusers.LCMScheduler(**betas), {"timesteps": steps})


def _is_regular(steps: list[int]) -> bool:
    """Whether the steps are the last of K equal parts of ``0 .. steps[0]``."""
    count, span = len(steps), steps[0] + 1
    return span % count == 0 and steps == [span // count * (count - i) - 1 for i in range(count)]


def _betas(config: Mapping[str, Any], schedule: VPSchedule, cut: int) -> dict[str, Any]:
    """The beta schedule's arguments, cut off after ``cut`` timesteps."""
    if cut == len(schedule) and not config.get("rescale_betas_zero_snr"):
        return {key: config[key] for key in _KEPT if config.get(key) is not None}
    abar = schedule.alphas_cumprod[:cut]
    before = torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
    return {"num_train_timesteps": cut, "trained_betas": (1 - abar / before).tolist()}
