"""What the flow-matching pipelines share."""

from __future__ import annotations

from torch import Tensor

from rlhf_t2i.algorithm.schedules import FlowSchedule
from rlhf_t2i.algorithm.student import Student
from rlhf_t2i.families.exported import ExportScheduler
from rlhf_t2i.families.flow_schedulers import dynamic_shift, even_timesteps, export_scheduler
from rlhf_t2i.families.pipeline import PipelineFamily


class FlowFamily(PipelineFamily):
    """A pipeline whose scheduler moves along the straight path from data to noise."""

    def default_timesteps(self, steps: int) -> tuple[float, ...]:
        """See :meth:`Family.default_timesteps`."""
        return even_timesteps(steps)

    def export_scheduler(self, student: Student) -> ExportScheduler:
        """See :meth:`PipelineFamily.export_scheduler`."""
        return export_scheduler(student)


class PackedFlowFamily(FlowFamily):
    """FLUX.1's layout, which others took over: tokens of 2 x 2 latents, a network that is given s, no size of its own.

    The network's ``in_channels`` are those of a token.
    """

    patch_size = 2

    @property
    def _channels(self) -> int:
        return super()._channels // 4

    def native_size(self) -> tuple[int, int]:
        """1024 x 1024, the pipeline's default: the network names no size."""
        return 1024, 1024

    def schedule(self, height: int, width: int) -> FlowSchedule:
        """See :meth:`Family.schedule`; the shift grows with the number of tokens where the scheduler says so."""
        _, h, w = self.latent_shape(height, width)
        return FlowSchedule(shift=dynamic_shift(self.scheduler_config, h * w // 4), time="sigma")

    def to_scheduler(self, latents: Tensor) -> Tensor:
        """Packed [B, h/2 * w/2, 4 C]; see :meth:`Family.to_scheduler`."""
        from diffusers import FluxPipeline

        return FluxPipeline._pack_latents(latents, *latents.shape)

    def from_scheduler(self, latents: Tensor, height: int, width: int) -> Tensor:
        """See :meth:`Family.from_scheduler`."""
        from diffusers import FluxPipeline

        return FluxPipeline._unpack_latents(latents, height, width, self._factor(None))
