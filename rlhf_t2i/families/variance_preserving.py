"""What the pipelines with a variance-preserving schedule share: Stable Diffusion, SDXL, PixArt."""

from __future__ import annotations

from functools import cached_property

from rlhf_t2i.algorithm.schedules import VPSchedule
from rlhf_t2i.algorithm.student import Student
from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.families.exported import ExportScheduler
from rlhf_t2i.families.pipeline import PipelineFamily
from rlhf_t2i.families.vp_schedulers import export_scheduler

_ONE_STEP_TIMESTEP = 399.0  # DMD2's and DI*'s one-step SDXL


class VPFamily(PipelineFamily):
    """A pipeline whose scheduler adds noise along a variance-preserving path."""

    def schedule(self, height: int, width: int) -> VPSchedule:
        """See :meth:`Family.schedule`; the same for every size."""
        return self._schedule

    @cached_property
    def _schedule(self) -> VPSchedule:
        place = f"{self.reference.location}/scheduler/scheduler_config.json"
        try:
            return VPSchedule.from_config(self.scheduler_config)
        except KeyError as error:
            raise UsageError(f"{place} has no {error.args[0]}: it is damaged") from None
        except (ValueError, TypeError, RuntimeError, AttributeError, OverflowError) as error:
            raise UsageError(f"{place}: {first_line(error)}") from None

    def default_timesteps(self, steps: int) -> tuple[float, ...]:
        """399 for one step; else the ends of K equal parts of the timesteps (four: 999, 749, 499, 249)."""
        last = self._schedule.last
        if steps == 1:
            return (min(_ONE_STEP_TIMESTEP, last),)
        part = (int(last) + 1) // steps
        return tuple(float(part * (steps - i) - 1) for i in range(steps))

    def export_scheduler(self, student: Student) -> ExportScheduler:
        """See :meth:`PipelineFamily.export_scheduler`."""
        return export_scheduler(self.scheduler_config, student)
