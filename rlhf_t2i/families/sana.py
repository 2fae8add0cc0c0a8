"""SANA: a flow-matching transformer with linear attention on latents 32 times smaller, conditioned by Gemma 2."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm.schedules import FlowSchedule, TimeArgument
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import sources
from rlhf_t2i.families.base import Conditioner, Conditioning, Decoder, Family
from rlhf_t2i.families.decoders import KLDecoder
from rlhf_t2i.families.flow_matching import FlowFamily
from rlhf_t2i.families.pipeline import bare_pipeline
from rlhf_t2i.families.sources import ModelRef

_TOKENS = 300  # the pipeline's max_sequence_length: every prompt is padded to it, and the padding masked
_TIMES: dict[float, TimeArgument] = {1.0: "thousandths", 0.001: "sigma"}
"""What the network is given, by its ``timestep_scale``: the pipeline multiplies 1000 s with it."""


class SanaFamily(FlowFamily):
    """SANA and SANA-1.5; a generator may be SANA-Sprint.

    The network predicts ``eps - x_0``. A prompt is encoded behind the pipeline's instruction to enhance it; the
    unconditional branch is the empty prompt without that instruction.
    """

    name = "sana"
    pipelines = ("SanaPipeline",)
    network_part = "transformer"
    network_class = "SanaTransformer2DModel"
    decoder_classes = ("AutoencoderDC",)
    block_names = ("SanaTransformerBlock",)
    reads_guidance: ClassVar[bool] = False
    """Whether the network is given a guidance scale, as SANA-Sprint's is."""

    def check(self) -> None:
        """See :meth:`Family.check`."""
        self.schedule(0, 0)
        self.native_size()
        self.part_class("text_encoder")
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
        if scale not in _TIMES:
            raise UsageError(f"{self._network_place}: timestep_scale is {sources.printable(scale)}, not 1 or 0.001")
        return FlowSchedule(shift=self.scheduler_number("flow_shift" if solver else "shift", 1.0), time=_TIMES[scale])

    def predict(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
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

    def plain_call(self, steps: int) -> dict[str, Any]:
        """See :meth:`Family.plain_call`; binning changes nothing at the model's own size."""
        return {"guidance_scale": 0.0, "use_resolution_binning": False}

    def for_generator(self, source: ModelRef) -> Family:
        """See :meth:`Family.for_generator`; a generator may be SANA-Sprint."""
        from rlhf_t2i.families.sana_sprint import SanaSprintFamily

        bare = source.file is not None or (source.is_local and Path(source.location).is_file())
        if bare or not self._other_config(source, "models.generator").get("guidance_embeds"):
            return self
        return SanaSprintFamily(self.reference, self.index, source)

    def load_conditioner(self, dtype: torch.dtype, height: int, width: int) -> Conditioner:
        """See :meth:`Family.load_conditioner`."""
        encoder = self.text_encoder("text_encoder", dtype)
        return _SanaConditioner(encoder, self.tokenizer("tokenizer", encoder))

    def make_decoder(self, vae: nn.Module) -> Decoder:
        """See :meth:`PipelineFamily.make_decoder`."""
        return _DCDecoder(vae)

    def example_conditioning(self, batch: int, height: int, width: int, dtype: torch.dtype) -> Conditioning:
        """See :meth:`Family.example_conditioning`."""
        embeds = torch.empty(batch, _TOKENS, self.network_config["caption_channels"], dtype=dtype)
        return Conditioning({"prompt_embeds": embeds, "prompt_mask": torch.empty(embeds.shape[:2])})


class _SanaConditioner(Conditioner):
    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:
        from diffusers import SanaPipeline

        super().__init__()
        self.encoder = encoder
        self._pipeline = bare_pipeline(SanaPipeline, text_encoder=encoder, tokenizer=tokenizer)
        self._instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        """See :meth:`Conditioner.encode_one`."""
        return self._row(prompt, self._instruction)

    def unconditional_row(self) -> dict[str, Tensor]:
        """See :meth:`Conditioner.unconditional_row`."""
        return self._row("", None)

    def _row(self, prompt: str, instruction: list[str] | None) -> dict[str, Tensor]:
        embeds, mask, _, _ = self._pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, device=next(self.encoder.parameters()).device,
            max_sequence_length=_TOKENS, complex_human_instruction=instruction,
        )  # fmt: skip
        return {"prompt_embeds": embeds[0].float(), "prompt_mask": mask[0].float()}


class _DCDecoder(KLDecoder):
    """AutoencoderDC, whose latents have no distribution."""

    block_names = ("ResBlock", "EfficientViTBlock")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See :meth:`Decoder.encode`."""
        dtype = next(self.vae.parameters()).dtype
        return self.vae.encode(images.to(dtype) * 2 - 1, return_dict=False)[0].float()
