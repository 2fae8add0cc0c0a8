"""Stable Diffusion 3 and 3.5: a flow-matching transformer, conditioned by two CLIP encoders and T5."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_t2i.algorithm.schedules import FlowSchedule
from rlhf_t2i.families import sources
from rlhf_t2i.families.base import Conditioning, NetworkCall
from rlhf_t2i.families.flow_matching import JOINT_ATTENTION, FlowFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class SD3Family(FlowFamily):
    """Stable Diffusion 3 (medium) and 3.5 (medium, large).

    The network predicts ``eps - x_0`` and is given 1000 s. T5 may be missing from the pipeline: its embeddings are
    then zeros, as in diffusers. The unconditional branch is the encoded empty prompt.
    """

    name = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    network_class = "SD3Transformer2DModel"
    decoder_classes = ("AutoencoderKL", "AutoencoderTiny")
    text_encoders = ("text_encoder", "text_encoder_2")
    block_names = ("JointTransformerBlock",)
    adapter_targets = JOINT_ATTENTION

    def most_patches(self) -> int | None:
        """See :meth:`PipelineFamily.most_patches`."""
        return int(self.network_config.get("pos_embed_max_size", 96))

    def schedule(self, height: int, width: int) -> FlowSchedule:
        """See :meth:`Family.schedule`; the scheduler's own shift, the same for every size unless it says otherwise."""
        _, h, w = self.latent_shape(height, width)
        return FlowSchedule(shift=self.dynamic_shift(h * w // 4))

    def predict(self, network: NetworkCall, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """See :meth:`Family.predict`."""
        return network(
            hidden_states=x_t,
            timestep=time,
            encoder_hidden_states=cond.tensors["prompt_embeds"].to(x_t.dtype),
            pooled_projections=cond.tensors["pooled_prompt_embeds"].to(x_t.dtype),
            return_dict=False,
        )[0]

    @property
    def encoder_parts(self) -> tuple[str, ...]:
        """T5 only where the pipeline holds it; see :attr:`PromptFamily.encoder_parts`."""
        entry = self.index.get("text_encoder_3")
        third = isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
        return (*self.text_encoders, "text_encoder_3") if third else self.text_encoders

    def encode_prompt(self, pipeline: DiffusionPipeline, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """See :meth:`PromptFamily.encode_prompt`."""
        # Without T5 the pipeline asks the transformer for the width of the zeros that stand in for its embeddings.
        width = int(self.network_config["joint_attention_dim"])
        pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=width))
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt, prompt, prompt, device=device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds[0].float(), "pooled_prompt_embeds": pooled[0].float()}

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`PromptFamily.conditioning_shapes`."""
        clip = sources.read_json(self.reference, "text_encoder/config.json").get("max_position_embeddings", 77)
        config = self.network_config
        return {
            "prompt_embeds": (clip + self.prompt_tokens, config["joint_attention_dim"]),
            "pooled_prompt_embeds": (config["pooled_projection_dim"],),
        }
