"""SANA-Sprint: SANA distilled to one to four steps, with guidance as an input of its network."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_t2i.algorithm.schedules import FlowSchedule
from rlhf_t2i.algorithm.student import Student
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import sources
from rlhf_t2i.families.base import Config, Family
from rlhf_t2i.families.pipeline import ExportScheduler
from rlhf_t2i.families.sana import SanaFamily
from rlhf_t2i.families.sources import ModelRef

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_GUIDANCE = 4.5  # the pipeline's guidance_scale
_START, _SECOND = 1.57080, 1.3  # the pipeline's angles of the first step, and of the second of two
_OWN_KEYS = ("guidance_embeds", "guidance_embeds_scale", "timestep_scale")


class SanaSprintFamily(SanaFamily):
    """SANA-Sprint's network: that of SANA-1.5 with a guidance scale as one more input, 4.5 here, and s as time.

    Its pipeline goes along circles, ``x_t = cos(t) x_0 + sin(t) eps``. Divided by ``cos(t) + sin(t)`` that is the path
    of flow matching with ``s = sin(t) / (cos(t) + sin(t))``, on which the network predicts ``eps - x_0``.

    As a reference its score is not that of the data: it is distilled. Beside a SANA as the reference it is the family
    of the generator alone.

    Args:
        reference: A SanaSprintPipeline; of a generator, the SANA that lends everything but the network.
        index: Its model_index.json.
        generator: The generator's network, if the reference is a SANA.
    """

    name = "sana_sprint"
    pipelines = ("SanaSprintPipeline",)
    guides = False
    reads_guidance = True

    def __init__(self, reference: ModelRef, index: Config, generator: ModelRef | None = None) -> None:
        pipeline = {"_class_name": "SanaSprintPipeline", "scheduler": ["diffusers", "SCMScheduler"]}
        super().__init__(reference, {**index, **pipeline})
        self._generator = generator

    @cached_property
    def network_config(self) -> Config:
        """See :attr:`Family.network_config`; of a generator, the reference's with what Sprint adds."""
        if self._generator is None:
            return super().network_config
        own = self._other_config(self._generator, "models.generator")
        return {**super().network_config, **{key: own[key] for key in _OWN_KEYS if key in own}}

    def check(self) -> None:
        """See :meth:`Family.check`."""
        super().check()
        self._guidance_scale()

    def for_generator(self, source: ModelRef) -> Family:
        """See :meth:`Family.for_generator`."""
        return self

    def schedule(self, height: int, width: int) -> FlowSchedule:
        """See :meth:`Family.schedule`; unshifted."""
        return FlowSchedule(time="sigma")

    def inputs(self, x_t: Tensor) -> dict[str, Tensor]:
        """See :meth:`SanaFamily.inputs`."""
        guidance = torch.full((len(x_t),), _GUIDANCE, device=x_t.device, dtype=x_t.dtype)
        return {"guidance": guidance * self._guidance_scale()}

    def _guidance_scale(self) -> float:
        scale = self.network_config.get("guidance_embeds_scale", 0.1)
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            place = self._network_place if self._generator is None else self._generator.location
            raise UsageError(f"{place}: guidance_embeds_scale is {sources.printable(scale)}, no number")
        return scale

    def default_timesteps(self, steps: int) -> tuple[float, ...]:
        """See :meth:`Family.default_timesteps`: 1000 and 782.7 for two, even angles for any other number."""
        angles = (_START, _SECOND) if steps == 2 else tuple(_START * (steps - k) / steps for k in range(steps))
        # The first angle is a little more than a right one, which is pure noise.
        return tuple(min(1000.0, 1000 * math.sin(t) / (math.sin(t) + math.cos(t))) for t in angles)

    def export_scheduler(self, student: Student) -> ExportScheduler:
        """See :meth:`PipelineFamily.export_scheduler`; the pipeline moves with fresh noise, along its own angles."""
        from diffusers import SCMScheduler

        if student.transition != "stochastic":
            raise UsageError(f"student.transition: a SanaSprintPipeline draws fresh noise, not {student.transition}")
        own = self.default_timesteps(student.steps)
        if any(abs(tau - mine) > 1e-2 for tau, mine in zip(student.timesteps, own, strict=True)):
            raise UsageError(
                f"student.timesteps: a SanaSprintPipeline draws {student.steps} steps at "
                f"{', '.join(f'{tau:g}' for tau in own)} alone: leave them out and set student.steps"
            )
        sigma = self.scheduler_config.get("sigma_data", 0.5)
        return ExportScheduler(SCMScheduler(sigma_data=sigma), _angles(student.steps))

    def plain_call(self, steps: int) -> dict[str, object]:
        """See :meth:`Family.plain_call`."""
        return {"guidance_scale": _GUIDANCE, "use_resolution_binning": False, **_angles(steps)}

    def guided_call(self, steps: int, scale: float) -> dict[str, object]:
        """See :meth:`Family.guided_call`; the network's own guidance is all there is."""
        return self.plain_call(steps)

    def sampler_for_check(self) -> SchedulerMixin:
        """See :meth:`Family.sampler_for_check`; of unit noise, whose states need no scale."""
        from diffusers import SCMScheduler

        return SCMScheduler(sigma_data=1.0)


def _angles(steps: int) -> dict[str, object]:
    """What the pipeline must be told unless it draws two steps."""
    return {} if steps == 2 else {"intermediate_timesteps": None}
