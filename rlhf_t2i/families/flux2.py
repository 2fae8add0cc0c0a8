"""FLUX.2 klein: a flow-matching transformer on patchified latents, conditioned by Qwen3."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm.schedules import FlowSchedule
from rlhf_t2i.families.base import Conditioning, Config, Decoder, NetworkCall
from rlhf_t2i.families.decoders import VAEDecoder
from rlhf_t2i.families.flow_matching import JOINT_ATTENTION, FlowFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_SAMPLING_STEPS = 50  # at which the pipeline's shift is taken as the training distribution's


class Flux2KleinFamily(FlowFamily):
    """FLUX.2 klein: the base model as reference, the distilled one as generator.

    The network predicts ``eps - x_0`` and is given s. Latents are the VAE's in patches of 2 x 2, normalized by the
    running statistics of its batch norm.
    """

    name = "flux2_klein"
    pipelines = ("Flux2KleinPipeline",)
    network_class = "Flux2Transformer2DModel"
    decoder_classes = ("AutoencoderKLFlux2",)
    block_names = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    adapter_targets = (*JOINT_ATTENTION, "to_qkv_mlp_proj")

    def latents_of(self, config: Config) -> object:
        """See :meth:`PipelineFamily.latents_of`: the network's channels are those of 2 x 2 latents."""
        return 4 * config.get("latent_channels", 32)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(4 C, h/2, w/2): patchified latents."""
        channels, h, w = super().latent_shape(height, width)
        return channels, h // 2, w // 2

    def schedule(self, height: int, width: int) -> FlowSchedule:
        """See :meth:`Family.schedule`; the shift grows with the number of tokens, as in the pipeline."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        _, h, w = self.latent_shape(height, width)
        return FlowSchedule(shift=math.exp(compute_empirical_mu(h * w, _SAMPLING_STEPS)), time="sigma")

    def to_scheduler(self, latents: Tensor) -> Tensor:
        """Tokens [B, h * w, C]; see :meth:`Family.to_scheduler`."""
        return latents.flatten(2).transpose(1, 2)

    def from_scheduler(self, latents: Tensor, height: int, width: int) -> Tensor:
        """See :meth:`Family.from_scheduler`."""
        _, h, w = self.latent_shape(height, width)
        return latents.transpose(1, 2).unflatten(2, (h, w))

    def predict(self, network: NetworkCall, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """See :meth:`Family.predict`."""
        from diffusers import Flux2KleinPipeline

        text = cond.tensors["prompt_embeds"].to(x_t.dtype)
        tokens = network(
            hidden_states=self.to_scheduler(x_t),
            timestep=time,
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(text).to(x_t.device),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(x_t).to(x_t.device),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, x_t.shape[2:])

    def encode_prompt(self, pipeline: DiffusionPipeline, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """See :meth:`PromptFamily.encode_prompt`."""
        return {"prompt_embeds": pipeline.encode_prompt(prompt, device=device)[0][0].float()}

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`PromptFamily.conditioning_shapes`."""
        return {"prompt_embeds": (self.prompt_tokens, self.network_config["joint_attention_dim"])}

    def make_decoder(self, vae: nn.Module) -> Decoder:
        """See :meth:`PipelineFamily.make_decoder`."""
        return _Flux2Decoder(vae)


class _Flux2Decoder(VAEDecoder):
    """AutoencoderKLFlux2, behind the inverse of its batch norm and of the patches."""

    attention_names = ("Attention",)

    def unscaled(self, latents: Tensor) -> Tensor:
        """See :meth:`VAEDecoder.unscaled`."""
        from diffusers import Flux2KleinPipeline

        norm = self.vae.bn
        std = (norm.running_var.float() + self.vae.config.batch_norm_eps).sqrt()
        x = latents * std.reshape(1, -1, 1, 1) + norm.running_mean.float().reshape(1, -1, 1, 1)
        return Flux2KleinPipeline._unpatchify_latents(x)
