"""What the pipelines with a variance-preserving schedule share: Stable Diffusion, SDXL, PixArt."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import nn

from rlhf_t2i.algorithm.schedules import VPSchedule
from rlhf_t2i.algorithm.student import Student
from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.families.base import Config, Decoder
from rlhf_t2i.families.decoders import KLDecoder
from rlhf_t2i.families.pipeline import ExportScheduler, PipelineFamily

_ONE_STEP_TIMESTEP = 399.0  # DMD2's and DI*'s one-step SDXL
_NO_MIXING = 1e6
_BETA_KEYS = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "trained_betas")


class VPFamily(PipelineFamily):
    """A pipeline whose scheduler adds noise along a variance-preserving path."""

    decoder_classes = ("AutoencoderKL", "AutoencoderTiny")

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

    def make_decoder(self, vae: nn.Module) -> Decoder:
        """See :meth:`PipelineFamily.make_decoder`."""
        return KLDecoder(vae)

    def export_scheduler(self, student: Student) -> ExportScheduler:
        """See :meth:`PipelineFamily.export_scheduler`.

        ``pipe(prompt, num_inference_steps=K, guidance_scale=0)`` must land on the student's timesteps without further
        arguments. A scheduler of K evenly spaced steps starts at its last training timestep, so that the exported one
        is cut off where the student starts: for one step at 399 its betas end at 399.

        Raises:
            UsageError: The timestep 0, or scaled noise with fresh noise between steps: no scheduler draws so.
        """
        import diffusers

        schedule = self._schedule
        steps = [int(schedule.index(torch.tensor([tau]))[0]) for tau in student.timesteps]
        regular = _is_regular(steps)
        settings = {
            **self._betas(steps[0] + 1 if regular else len(schedule)),
            "prediction_type": schedule.prediction_type,
            "steps_offset": 1,  # unused by these spacings; other values make Stable Diffusion's pipeline warn
        }
        if steps[-1] == 0:
            raise UsageError("student.timesteps: 0 is the end of the path, from which no scheduler of diffusers draws")
        deterministic, several = student.transition == "deterministic", student.steps > 1
        if student.input == "sigma" and several and not deterministic:
            raise UsageError("student.input: sigma with several steps needs student.transition: deterministic")
        if not regular and (student.input == "sigma" or deterministic):
            key = "input: sigma" if student.input == "sigma" else "transition: deterministic"
            raise UsageError(f"student.timesteps {steps} are not evenly spaced: with {key} no export draws them")
        if student.input == "sigma":
            return ExportScheduler(diffusers.EulerDiscreteScheduler(**settings, timestep_spacing="trailing"))
        if deterministic and several:
            settings |= {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
            return ExportScheduler(diffusers.DDIMScheduler(**settings))
        # The scheduler mixes its input into what the network predicts, the more the smaller the timestep: at 3 one part
        # in 4,000 of the noise. The student does not; a large scale leaves nothing of it.
        settings["timestep_scaling"] = _NO_MIXING
        if regular:
            return ExportScheduler(diffusers.LCMScheduler(**settings, original_inference_steps=student.steps))
        return ExportScheduler(diffusers.LCMScheduler(**settings), {"timesteps": steps})

    def _betas(self, cut: int) -> Config:
        """The beta schedule's arguments, cut off after ``cut`` timesteps."""
        config, schedule = self.scheduler_config, self._schedule
        if cut == len(schedule) and not config.get("rescale_betas_zero_snr"):
            return {key: config[key] for key in _BETA_KEYS if config.get(key) is not None}
        abar = schedule.alphas_cumprod[:cut]
        before = torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
        return {"num_train_timesteps": cut, "trained_betas": (1 - abar / before).tolist()}


def _is_regular(steps: list[int]) -> bool:
    """Whether the steps are the last of K equal parts of ``0 .. steps[0]``."""
    count, span = len(steps), steps[0] + 1
    return span % count == 0 and steps == [span // count * (count - i) - 1 for i in range(count)]
