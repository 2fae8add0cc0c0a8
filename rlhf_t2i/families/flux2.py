"""FLUX.2 klein: a flow-matching transformer on patchified latents, conditioned by Qwen3."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm.schedules import FlowSchedule
from rlhf_t2i.families.base import Conditioner, Conditioning, Decoder
from rlhf_t2i.families.flow_matching import FlowFamily
from rlhf_t2i.families.frozen import freeze_convs
from rlhf_t2i.families.pipeline import bare_pipeline

_TOKENS = 512  # the pipeline's max_sequence_length
_SAMPLING_STEPS = 50  # at which the pipeline's shift is taken as the training distribution's


class Flux2KleinFamily(FlowFamily):
    """FLUX.2 klein: the base model as reference, the distilled one as generator.

    The network predicts ``eps - x_0`` and is given s. Latents are the VAE's in patches of 2 x 2, normalized by the
    running statistics of its batch norm.
    """

    name = "flux2_klein"
    pipelines = ("Flux2KleinPipeline",)
    network_part = "transformer"
    network_class = "Flux2Transformer2DModel"
    decoder_classes = ("AutoencoderKLFlux2",)
    patch_size = 2
    block_names = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    adapter_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj",
    )  # fmt: skip

    def check(self) -> None:
        """See :meth:`Family.check`."""
        self.schedule(16, 16)
        self.part_class("text_encoder")

    def check_decoder(self, source: Any) -> None:
        """See :meth:`Family.check_decoder`; the network's channels are those of 2 x 2 latents."""
        channels = self.decoder_config(source).get("latent_channels", 32)
        if 4 * channels != self._channels:
            self._refuse_channels(source, 4 * channels)

    def native_size(self) -> tuple[int, int]:
        """1024 x 1024, the pipeline's default: the network names no size."""
        return 1024, 1024

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

    def predict(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
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

    def load_conditioner(self, dtype: torch.dtype, height: int, width: int) -> Conditioner:
        """See :meth:`Family.load_conditioner`."""
        encoder = self.text_encoder("text_encoder", dtype)
        return _Flux2Conditioner(encoder, self.tokenizer("tokenizer", encoder))

    def make_decoder(self, vae: nn.Module) -> Decoder:
        """See :meth:`PipelineFamily.make_decoder`."""
        return _Flux2Decoder(vae)

    def example_conditioning(self, batch: int, height: int, width: int, dtype: torch.dtype) -> Conditioning:
        """See :meth:`Family.example_conditioning`."""
        width = self.network_config["joint_attention_dim"]
        return Conditioning({"prompt_embeds": torch.empty(batch, _TOKENS, width, dtype=dtype)})


class _Flux2Conditioner(Conditioner):
    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:
        from diffusers import Flux2KleinPipeline

        super().__init__()
        self.encoder = encoder
        self._pipeline = bare_pipeline(Flux2KleinPipeline, text_encoder=encoder, tokenizer=tokenizer)

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        """See :meth:`Conditioner.encode_one`."""
        embeds, _ = self._pipeline.encode_prompt(prompt, device=next(self.encoder.parameters()).device)
        return {"prompt_embeds": embeds[0].float()}


class _Flux2Decoder(Decoder):
    """AutoencoderKLFlux2, behind the inverse of its batch norm and of the patches."""

    block_names = ("ResnetBlock2D",)

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = freeze_convs(vae)

    def decode(self, latents: Tensor) -> Tensor:
        """See :meth:`Decoder.decode`."""
        from diffusers import Flux2KleinPipeline

        norm = self.vae.bn
        std = (norm.running_var.float() + self.vae.config.batch_norm_eps).sqrt()
        x = latents.float() * std.reshape(1, -1, 1, 1) + norm.running_mean.float().reshape(1, -1, 1, 1)
        weights_dtype = self.vae.decoder.conv_in.weight.dtype
        image = self.vae.decode(Flux2KleinPipeline._unpatchify_latents(x).to(weights_dtype), return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)
