"""FLUX.1 (dev and schnell): a flow-matching transformer on packed latents, conditioned by CLIP and T5."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_t2i.families.base import Conditioning, NetworkCall
from rlhf_t2i.families.flow_matching import JOINT_ATTENTION, PackedFlowFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_EMBEDDED_GUIDANCE = 3.5  # the pipeline's guidance_scale, which dev reads as an input


class FluxFamily(PackedFlowFamily):
    """FLUX.1-dev and FLUX.1-schnell.

    The network predicts ``eps - x_0`` of latents packed into tokens of 2 x 2, and is given s. dev reads a guidance
    scale as an input (3.5 here, for every role): its score is that of guided samples, not of the data. Guidance by the
    recipe's ``cfg`` comes on top, as the pipeline's ``true_cfg_scale``.
    """

    name = "flux"
    pipelines = ("FluxPipeline",)
    network_class = "FluxTransformer2DModel"
    text_encoders = ("text_encoder", "text_encoder_2")
    block_names = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    adapter_targets = JOINT_ATTENTION

    def predict(self, network: NetworkCall, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """See :meth:`Family.predict`."""
        from diffusers import FluxPipeline

        count, _, h, w = x_t.shape
        text = cond.tensors["prompt_embeds"].to(x_t.dtype)
        packed = network(
            hidden_states=self.to_scheduler(x_t),
            timestep=time,
            guidance=cond.tensors.get("guidance"),
            pooled_projections=cond.tensors["pooled_prompt_embeds"].to(x_t.dtype),
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=FluxPipeline._prepare_latent_image_ids(count, h // 2, w // 2, x_t.device, x_t.dtype),
            return_dict=False,
        )[0]
        factor = self._factor(None)
        return self.from_scheduler(packed, h * factor, w * factor)

    def encode_prompt(self, pipeline: DiffusionPipeline, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """See :meth:`PromptFamily.encode_prompt`."""
        embeds, pooled, _ = pipeline.encode_prompt(prompt, device=device)
        return {"prompt_embeds": embeds[0].float(), "pooled_prompt_embeds": pooled[0].float()}

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`PromptFamily.conditioning_shapes`."""
        config = self.network_config
        return {
            "prompt_embeds": (self.prompt_tokens, config["joint_attention_dim"]),
            "pooled_prompt_embeds": (config["pooled_projection_dim"],),
        }

    def constant_conditioning(self, height: int, width: int) -> dict[str, Tensor]:
        """The guidance that dev reads; see :meth:`PromptFamily.constant_conditioning`."""
        return {"guidance": torch.tensor(_EMBEDDED_GUIDANCE)} if self.network_config.get("guidance_embeds") else {}

    def guided_call(self, steps: int, scale: float) -> dict[str, object]:
        """See :meth:`Family.guided_call`."""
        return self.plain_call(steps) | {"true_cfg_scale": scale, "negative_prompt": ""}

    def plain_call(self, steps: int) -> dict[str, object]:
        """See :meth:`Family.plain_call`; without ``guidance_scale`` the pipeline passes its own 3.5."""
        return {"guidance_scale": _EMBEDDED_GUIDANCE}
