"""SANA: a flow-matching transformer with linear attention on latents 32 times smaller, conditioned by Gemma 2."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm.schedules import FlowSchedule, TimeArgument
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import sources
from rlhf_t2i.families.base import Conditioning, Decoder, Family, NetworkCall
from rlhf_t2i.families.decoders import KLDecoder
from rlhf_t2i.families.flow_matching import FlowFamily
from rlhf_t2i.families.sources import ModelRef

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_TIMES: dict[float, TimeArgument] = {1.0: "thousandths", 0.001: "sigma"}
"""What the network is given, by its ``timestep_scale``: the pipeline multiplies 1000 s with it."""


class SanaFamily(FlowFamily):
    """SANA and SANA-1.5; a generator may be SANA-Sprint.

    The network predicts ``eps - x_0``. A prompt is encoded behind the pipeline's instruction to enhance it, padded to
    the pipeline's ``max_sequence_length``, and the padding masked. The unconditional branch is the empty prompt without
    that instruction.
    """

    name = "sana"
    pipelines = ("SanaPipeline",)
    network_class = "SanaTransformer2DModel"
    decoder_classes = ("AutoencoderDC",)
    patch_size = 1
    side_multiple = 32
    block_names = ("SanaTransformerBlock",)
    reads_guidance: ClassVar[bool] = False
    """Whether the network is given a guidance scale, as SANA-Sprint's is."""

    def check(self) -> None:
        """See :meth:`Family.check`."""
        super().check()
        for key, value in {"patch_size": 1, "guidance_embeds": self.reads_guidance}.items():
            found = self.network_config.get(key, value)
            if found != value:
                raise UsageError(
                    f"{self._network_place}: {key} is {sources.printable(found)}; a {self.pipelines[0]} calls only "
                    f"networks with {value}"
                )

    def schedule(self, height: int, width: int) -> FlowSchedule:
        """See :meth:`Family.schedule`; the scheduler's own shift, the same for every size."""
        # The published models come with a DPM-Solver, which also exists for variance-preserving models.
        solver = self.scheduler_config.get("_class_name") == "DPMSolverMultistepScheduler"
        kind = self.scheduler_config.get("prediction_type")
        if solver and kind != "flow_prediction":
            raise UsageError(
                f"{self.reference.location}/scheduler/scheduler_config.json: prediction_type is "
                f"{sources.printable(kind)}, but SANA is trained by flow matching (flow_prediction)"
            )
        scale = self.network_config.get("timestep_scale", 1.0)
        if not isinstance(scale, int | float) or scale not in _TIMES:
            raise UsageError(f"{self._network_place}: timestep_scale is {sources.printable(scale)}, not 1 or 0.001")
        return FlowSchedule(shift=self.scheduler_number("flow_shift" if solver else "shift", 1.0), time=_TIMES[scale])

    def predict(self, network: NetworkCall, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """See :meth:`Family.predict`."""
        return network(
            x_t,
            encoder_hidden_states=cond.tensors["prompt_embeds"].to(x_t.dtype),
            encoder_attention_mask=cond.tensors["prompt_mask"],
            timestep=time,
            return_dict=False,
            **self.inputs(x_t),
        )[0]

    def inputs(self, x_t: Tensor) -> dict[str, Tensor]:
        """What the network is given besides latents, time and prompts."""
        return {}

    def plain_call(self, steps: int) -> dict[str, object]:
        """See :meth:`Family.plain_call`; binning changes nothing at the model's own size."""
        return {"guidance_scale": 0.0, "use_resolution_binning": False}

    def for_generator(self, source: ModelRef) -> Family:
        """See :meth:`Family.for_generator`; a generator may be SANA-Sprint."""
        from rlhf_t2i.families.sana_sprint import SanaSprintFamily

        bare = source.file is not None or (source.is_local and Path(source.location).is_file())
        if bare or not self._other_config(source, "models.generator").get("guidance_embeds"):
            return self
        return SanaSprintFamily(self.reference, self.index, source)

    @property
    def pipeline_class(self) -> type[DiffusionPipeline]:
        """SanaPipeline, also of SANA-Sprint, whose own encodes prompts and saves adapters alike."""
        from diffusers import SanaPipeline

        return SanaPipeline

    def encode_prompt(self, pipeline: DiffusionPipeline, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """See :meth:`PromptFamily.encode_prompt`."""
        default = inspect.signature(self.pipeline_class.__call__).parameters["complex_human_instruction"].default
        return _encode(pipeline, prompt, device, default)

    def encode_unconditional(self, pipeline: DiffusionPipeline, device: torch.device) -> dict[str, Tensor]:
        """See :meth:`PromptFamily.encode_unconditional`."""
        return _encode(pipeline, "", device, None)

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`PromptFamily.conditioning_shapes`."""
        tokens = self.prompt_tokens
        return {"prompt_embeds": (tokens, self.network_config["caption_channels"]), "prompt_mask": (tokens,)}

    def make_decoder(self, vae: nn.Module) -> Decoder:
        """See :meth:`PipelineFamily.make_decoder`."""
        return _DCDecoder(vae)


def _encode(
    pipeline: DiffusionPipeline, prompt: str, device: torch.device, instruction: list[str] | None
) -> dict[str, Tensor]:
    embeds, mask, _, _ = pipeline.encode_prompt(
        prompt, do_classifier_free_guidance=False, device=device, complex_human_instruction=instruction
    )
    return {"prompt_embeds": embeds[0].float(), "prompt_mask": mask[0].float()}


class _DCDecoder(KLDecoder):
    """AutoencoderDC, whose latents have no distribution."""

    block_names = ("ResBlock", "EfficientViTBlock")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See :meth:`Decoder.encode`."""
        return self.vae.encode(images.to(self._dtype) * 2 - 1, return_dict=False)[0].float()
