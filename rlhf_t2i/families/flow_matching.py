"""What the flow-matching pipelines share: Stable Diffusion 3, FLUX, Z-Image."""

from __future__ import annotations

from rlhf_t2i.algorithm.student import Student
from rlhf_t2i.families.exported import ExportScheduler
from rlhf_t2i.families.flow_schedulers import even_timesteps, export_scheduler
from rlhf_t2i.families.pipeline import PipelineFamily


class FlowFamily(PipelineFamily):
    """A pipeline whose scheduler moves along the straight path from data to noise."""

    def default_timesteps(self, steps: int) -> tuple[float, ...]:
        """See :meth:`Family.default_timesteps`."""
        return even_timesteps(steps)

    def export_scheduler(self, student: Student) -> ExportScheduler:
        """See :meth:`PipelineFamily.export_scheduler`."""
        return export_scheduler(student)
