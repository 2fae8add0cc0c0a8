"""What the flow-matching pipelines share."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm.schedules import FlowSchedule
from rlhf_t2i.algorithm.student import Student
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import sources
from rlhf_t2i.families.base import Decoder
from rlhf_t2i.families.decoders import KLDecoder
from rlhf_t2i.families.pipeline import ExportScheduler, PipelineFamily

JOINT_ATTENTION = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
"""Linear layers of the blocks that attend to image and prompt at once."""


class FlowFamily(PipelineFamily):
    """A pipeline whose scheduler moves along the straight path from data to noise."""

    network_part = "transformer"
    decoder_classes: ClassVar[tuple[str, ...]] = ("AutoencoderKL",)
    patch_size = 2

    def check(self) -> None:
        """See :meth:`Family.check`; besides, the scheduler must give the network the times that it is given here."""
        super().check()
        config, place = self.scheduler_config, f"{self.reference.location}/scheduler/scheduler_config.json"
        if config.get("num_train_timesteps", 1000) != 1000:
            found = sources.printable(config["num_train_timesteps"])
            raise UsageError(f"{place}: num_train_timesteps is {found}; a flow-matching model is called with 1000 here")
        if config.get("invert_sigmas"):
            raise UsageError(
                f"{place}: invert_sigmas is set; such a model, whose path runs from noise to data, is not known"
            )

    def dynamic_shift(self, tokens: int) -> float:
        """The timestep shift for an image of so many tokens, as the scheduler's configuration gives it.

        With ``use_dynamic_shifting`` it is ``exp(mu)`` for a mu that is linear in the number of tokens (FLUX), or mu.

        Raises:
            UsageError: The configuration is damaged.
        """
        config = self.scheduler_config
        if not config.get("use_dynamic_shifting"):
            return self.scheduler_number("shift", 1.0)
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        keys = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        first, last, low, high = (self.scheduler_number(key, default) for key, default in keys.items())
        if first == last:
            place = f"{self.reference.location}/scheduler/scheduler_config.json"
            raise UsageError(f"{place}: base_image_seq_len and max_image_seq_len are both {first:g}: damaged")
        mu = calculate_shift(tokens, first, last, low, high)
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def make_decoder(self, vae: nn.Module) -> Decoder:
        """See :meth:`PipelineFamily.make_decoder`."""
        return KLDecoder(vae, shift=float(getattr(vae.config, "shift_factor", None) or 0.0))

    def default_timesteps(self, steps: int) -> tuple[float, ...]:
        """K even steps from pure noise, ``1000 (K - k + 1) / K``: 1000, 750, 500, 250 for four."""
        return tuple(1000 * (steps - i) / steps for i in range(steps))

    def export_scheduler(self, student: Student) -> ExportScheduler:
        """See :meth:`PipelineFamily.export_scheduler`.

        The pipelines spread ``num_inference_steps`` evenly from 1 to nearly 0; ``shift_terminal`` ends them at the
        student's last step instead. Steps that are not even are passed to the pipeline as ``sigmas``.

        Raises:
            UsageError: A student that does not start from pure noise, as every flow-matching pipeline does.
        """
        import diffusers

        assert isinstance(student.schedule, FlowSchedule)
        if student.timesteps[0] != 1000:
            raise UsageError(
                "student.timesteps: a flow-matching pipeline starts at 1000 (pure noise), not at "
                f"{student.timesteps[0]:g}"
            )
        stochastic = student.transition == "stochastic"
        cls = diffusers.FlowMatchLCMScheduler if stochastic else diffusers.FlowMatchEulerDiscreteScheduler
        # For one step the terminal value would be the start itself.
        terminal = student.timesteps[-1] / 1000 if student.steps > 1 else None
        even = cls(shift=1.0, shift_terminal=terminal)
        even.set_timesteps(student.steps)
        wanted = torch.tensor(student.timesteps, dtype=torch.float64)
        if torch.allclose(even.timesteps.double(), wanted, rtol=0, atol=1e-2):
            return ExportScheduler(cls(shift=1.0, shift_terminal=terminal))
        return ExportScheduler(cls(shift=1.0), {"sigmas": [tau / 1000 for tau in student.timesteps]})


class PackedFlowFamily(FlowFamily):
    """FLUX.1's layout: tokens of 2 x 2 latents, whose channels are the network's, which is given s."""

    @property
    def _channels(self) -> int:
        return super()._channels // 4

    def schedule(self, height: int, width: int) -> FlowSchedule:
        """See :meth:`Family.schedule`; the shift grows with the number of tokens where the scheduler says so."""
        _, h, w = self.latent_shape(height, width)
        return FlowSchedule(shift=self.dynamic_shift(h * w // 4), time="sigma")

    def to_scheduler(self, latents: Tensor) -> Tensor:
        """Packed [B, h/2 * w/2, 4 C]; see :meth:`Family.to_scheduler`."""
        from diffusers import FluxPipeline

        return FluxPipeline._pack_latents(latents, *latents.shape)

    def from_scheduler(self, latents: Tensor, height: int, width: int) -> Tensor:
        """See :meth:`Family.from_scheduler`."""
        from diffusers import FluxPipeline

        return FluxPipeline._unpack_latents(latents, height, width, self._factor(None))
