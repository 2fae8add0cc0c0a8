"""SDXL and Stable Diffusion 1.5: UNets on a variance-preserving schedule, conditioned by CLIP text encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import sources
from rlhf_t2i.families.base import Conditioning, Decoder, NetworkCall
from rlhf_t2i.families.decoders import KLDecoder
from rlhf_t2i.families.variance_preserving import VPFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class UNetFamily(VPFamily):
    """What SDXL and Stable Diffusion 1.5 share."""

    network_part = "unet"
    network_class = "UNet2DConditionModel"
    block_names = ("ResnetBlock2D", "BasicTransformerBlock")

    def check(self) -> None:
        """See :meth:`Family.check`."""
        super().check()
        config = self._complete(self.network_config)
        if config.get("in_channels") != config.get("out_channels"):
            raise UsageError(
                f"{self._network_place}: {config.get('in_channels')} input and {config.get('out_channels')} output "
                "channels: only text-to-image UNets are supported"
            )

    def predict(self, network: NetworkCall, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """See :meth:`Family.predict`."""
        tensors = cond.tensors
        added = {"text_embeds": tensors["pooled_prompt_embeds"].to(x_t.dtype), "time_ids": tensors["time_ids"].to(
            x_t.dtype)} if "time_ids" in tensors else None  # fmt: skip
        # Convolutions then keep channels last to the end, whatever the layout of their weights (which ZeRO flattens).
        return network(
            x_t.contiguous(memory_format=torch.channels_last), time,
            encoder_hidden_states=tensors["prompt_embeds"].to(x_t.dtype), added_cond_kwargs=added, return_dict=False,
        )[0]  # fmt: skip

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`PromptFamily.conditioning_shapes`."""
        texts = [sources.read_json(self.reference, f"{part}/config.json") for part in self.encoder_parts]
        tokens = min(int(text.get("max_position_embeddings", 77)) for text in texts)
        return {"prompt_embeds": (tokens, self.network_config["cross_attention_dim"])}


class SD15Family(UNetFamily):
    """Stable Diffusion 1.5: one text encoder, its last hidden state; unconditional is the encoded empty prompt."""

    name = "sd15"
    pipelines = ("StableDiffusionPipeline",)

    def make_decoder(self, vae: nn.Module) -> Decoder:
        """See :meth:`PipelineFamily.make_decoder`."""
        config = vae.config
        if any(config.get(key) is not None for key in ("latents_mean", "latents_std")) or config.get("shift_factor"):
            raise UsageError(
                "the VAE has latents_mean, latents_std or a shift_factor, which StableDiffusionPipeline does not "
                "apply: its images would differ from training's"
            )
        return super().make_decoder(vae)

    def encode_prompt(self, pipeline: DiffusionPipeline, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """See :meth:`PromptFamily.encode_prompt`."""
        embeds, _ = pipeline.encode_prompt(prompt, device, 1, False)
        return {"prompt_embeds": embeds[0].float()}


class SDXLFamily(UNetFamily):
    """SDXL (algorithm.md 5): two text encoders, the penultimate hidden states of each, side by side.

    The second one's projection is ``pooled_prompt_embeds``; ``time_ids`` are ``(H, W, 0, 0, H, W)``; the unconditional
    branch is all zeros.
    """

    name = "sdxl"
    pipelines = ("StableDiffusionXLPipeline",)
    text_encoders = ("text_encoder", "text_encoder_2")

    def make_decoder(self, vae: nn.Module) -> Decoder:
        """See :meth:`PipelineFamily.make_decoder`; mean and std as StableDiffusionXLPipeline applies them."""
        return KLDecoder(vae, mean=vae.config.get("latents_mean"), std=vae.config.get("latents_std"))

    def encode_prompt(self, pipeline: DiffusionPipeline, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """See :meth:`PromptFamily.encode_prompt`."""
        embeds, _, pooled, _ = pipeline.encode_prompt(prompt, device=device, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds[0].float(), "pooled_prompt_embeds": pooled[0].float()}

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`PromptFamily.conditioning_shapes`."""
        config = self.network_config
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return super().conditioning_shapes() | {"pooled_prompt_embeds": (pooled,)}

    def constant_conditioning(self, height: int, width: int) -> dict[str, Tensor]:
        """The sizes before and after cropping; see :meth:`PromptFamily.constant_conditioning`."""
        return {"time_ids": torch.tensor([height, width, 0, 0, height, width]).float()}

    def encode_unconditional(self, pipeline: DiffusionPipeline, device: torch.device) -> dict[str, Tensor]:
        """See :meth:`PromptFamily.encode_unconditional`."""
        row = super().encode_unconditional(pipeline, device)
        zeros = self.index.get("force_zeros_for_empty_prompt", True)
        return {name: torch.zeros_like(value) for name, value in row.items()} if zeros else row
