"""Stable Diffusion 3 and 3.5: a flow-matching transformer, conditioned by two CLIP encoders and T5."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm.schedules import FlowSchedule
from rlhf_t2i.families import sources
from rlhf_t2i.families.base import Conditioner, Conditioning, Decoder
from rlhf_t2i.families.decoders import KLDecoder
from rlhf_t2i.families.flow_matching import FlowFamily
from rlhf_t2i.families.pipeline import bare_pipeline

_T5_TOKENS = 256  # the pipeline's max_sequence_length


class SD3Family(FlowFamily):
    """Stable Diffusion 3 (medium) and 3.5 (medium, large).

    The network predicts ``eps - x_0`` and is given 1000 s. T5 may be missing from the pipeline: its embeddings are
    then zeros, as in diffusers. The unconditional branch is the encoded empty prompt.
    """

    name = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    network_part = "transformer"
    network_class = "SD3Transformer2DModel"
    decoder_classes = ("AutoencoderKL", "AutoencoderTiny")
    patch_size = 2
    block_names = ("JointTransformerBlock",)
    adapter_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip

    def check(self) -> None:
        """See :meth:`Family.check`."""
        self.schedule(0, 0)
        self.native_size()
        for part in ("text_encoder", "text_encoder_2"):
            self.part_class(part)

    def most_patches(self) -> int | None:
        """See :meth:`PipelineFamily.most_patches`."""
        return int(self.network_config.get("pos_embed_max_size", 96))

    def schedule(self, height: int, width: int) -> FlowSchedule:
        """See :meth:`Family.schedule`; the scheduler's own shift, the same for every size."""
        return FlowSchedule(shift=self.scheduler_number("shift", 1.0))

    def predict(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """See :meth:`Family.predict`."""
        return network(
            hidden_states=x_t,
            timestep=time,
            encoder_hidden_states=cond.tensors["prompt_embeds"].to(x_t.dtype),
            pooled_projections=cond.tensors["pooled_prompt_embeds"].to(x_t.dtype),
            return_dict=False,
        )[0]

    def load_conditioner(self, dtype: torch.dtype, height: int, width: int) -> Conditioner:
        """See :meth:`Family.load_conditioner`."""
        encoders = {part: self.text_encoder(part, dtype) for part in self._encoder_parts}
        tokenizers = {
            part.replace("text_encoder", "tokenizer"): self.tokenizer(
                part.replace("text_encoder", "tokenizer"), encoder
            )
            for part, encoder in encoders.items()
        }
        return _SD3Conditioner(encoders, tokenizers, int(self.network_config["joint_attention_dim"]))

    @property
    def _encoder_parts(self) -> list[str]:
        entry = self.index.get("text_encoder_3")
        third = isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
        return ["text_encoder", "text_encoder_2", *(["text_encoder_3"] if third else [])]

    def build_text_encoders(self) -> nn.Module:
        """See :meth:`Family.build_text_encoders`."""
        return self.meta_text_encoders(*self._encoder_parts)

    def make_decoder(self, vae: nn.Module) -> Decoder:
        """See :meth:`PipelineFamily.make_decoder`."""
        config: Any = vae.config
        return KLDecoder(vae, shift=float(getattr(config, "shift_factor", None) or 0.0))

    def example_conditioning(self, batch: int, height: int, width: int, dtype: torch.dtype) -> Conditioning:
        """See :meth:`Family.example_conditioning`."""
        clip = sources.read_json(self.reference, "text_encoder/config.json").get("max_position_embeddings", 77)
        tokens = clip + (_T5_TOKENS if "text_encoder_3" in self._encoder_parts else clip)
        config = self.network_config
        return Conditioning(
            {
                "prompt_embeds": torch.empty(batch, tokens, config["joint_attention_dim"], dtype=dtype),
                "pooled_prompt_embeds": torch.empty(batch, config["pooled_projection_dim"], dtype=dtype),
            }
        )


class _SD3Conditioner(Conditioner):
    def __init__(self, encoders: dict[str, nn.Module], tokenizers: dict[str, Any], width: int) -> None:
        from diffusers import StableDiffusion3Pipeline

        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self._pipeline = bare_pipeline(StableDiffusion3Pipeline, **encoders, **tokenizers)
        # Without T5 the pipeline asks the transformer for the width of the zeros that stand in for its embeddings.
        self._pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=width))

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        """See :meth:`Conditioner.encode_one`."""
        embeds, _, pooled, _ = self._pipeline.encode_prompt(
            prompt, prompt, prompt, device=next(self.encoders.parameters()).device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds[0].float(), "pooled_prompt_embeds": pooled[0].float()}
