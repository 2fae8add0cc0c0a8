"""SDXL and Stable Diffusion 1.5: UNets on a variance-preserving schedule, conditioned by CLIP text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import sources
from rlhf_t2i.families.base import Conditioner, Conditioning, Config, Decoder
from rlhf_t2i.families.decoders import KLDecoder
from rlhf_t2i.families.pipeline import bare_pipeline
from rlhf_t2i.families.variance_preserving import VPFamily


class UNetFamily(VPFamily):
    """What SDXL and Stable Diffusion 1.5 share."""

    network_part = "unet"
    network_class = "UNet2DConditionModel"
    decoder_classes = ("AutoencoderKL", "AutoencoderTiny")
    block_names = ("ResnetBlock2D", "BasicTransformerBlock")

    def check(self) -> None:
        """See :meth:`Family.check`."""
        self.schedule(0, 0)
        self.native_size()
        config = self._complete(self.network_config)
        if config.get("in_channels") != config.get("out_channels"):
            raise UsageError(
                f"{self.reference.location}/unet/config.json: {config.get('in_channels')} input and "
                f"{config.get('out_channels')} output channels: only text-to-image UNets are supported"
            )

    def predict(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """See :meth:`Family.predict`."""
        tensors = cond.tensors
        added = {"text_embeds": tensors["pooled_prompt_embeds"].to(x_t.dtype), "time_ids": tensors["time_ids"].to(
            x_t.dtype)} if "time_ids" in tensors else None  # fmt: skip
        # Convolutions then keep channels last to the end, whatever the layout of their weights (which ZeRO flattens).
        return network(
            x_t.contiguous(memory_format=torch.channels_last), time,
            encoder_hidden_states=tensors["prompt_embeds"].to(x_t.dtype), added_cond_kwargs=added, return_dict=False,
        )[0]  # fmt: skip


class SD15Family(UNetFamily):
    """Stable Diffusion 1.5: one text encoder, its last hidden state; unconditional is the encoded empty prompt."""

    name = "sd15"
    pipelines = ("StableDiffusionPipeline",)

    def load_conditioner(self, dtype: torch.dtype, height: int, width: int) -> Conditioner:
        """See :meth:`Family.load_conditioner`."""
        encoder = self.text_encoder("text_encoder", dtype)
        return _SD15Conditioner(encoder, self.tokenizer("tokenizer", encoder))

    def make_decoder(self, vae: nn.Module) -> Decoder:
        """See :meth:`PipelineFamily.make_decoder`."""
        config: Any = vae.config
        if any(config.get(key) is not None for key in ("latents_mean", "latents_std")) or config.get("shift_factor"):
            raise UsageError(
                "the VAE has latents_mean, latents_std or a shift_factor, which StableDiffusionPipeline does not "
                "apply: its images would differ from training's"
            )
        return KLDecoder(vae)

    def example_conditioning(self, batch: int, height: int, width: int, dtype: torch.dtype) -> Conditioning:
        """See :meth:`Family.example_conditioning`."""
        return Conditioning({"prompt_embeds": _embeds(self, self.network_config, batch, ["text_encoder"], dtype)})


class SDXLFamily(UNetFamily):
    """SDXL (algorithm.md 5): two text encoders, the penultimate hidden states of each, side by side.

    The second one's projection is ``pooled_prompt_embeds``; ``time_ids`` are ``(H, W, 0, 0, H, W)``; the unconditional
    branch is all zeros.
    """

    name = "sdxl"
    pipelines = ("StableDiffusionXLPipeline",)

    def check(self) -> None:
        """See :meth:`Family.check`."""
        super().check()
        entry = self.index.get("text_encoder_2")
        if not (isinstance(entry, list) and entry and entry[0] is not None):
            raise UsageError(
                f"{self.reference.location}/model_index.json names no text_encoder_2, which its UNet needs: it is "
                "damaged or of another model"
            )

    def load_conditioner(self, dtype: torch.dtype, height: int, width: int) -> Conditioner:
        """See :meth:`Family.load_conditioner`."""
        first, second = (self.text_encoder(part, dtype) for part in ("text_encoder", "text_encoder_2"))
        tokenizers = self.tokenizer("tokenizer", first), self.tokenizer("tokenizer_2", second)
        zeros = bool(self.index.get("force_zeros_for_empty_prompt", True))
        return _SDXLConditioner((first, second), tokenizers, height, width, zeros)

    def build_text_encoders(self) -> nn.Module:
        """See :meth:`Family.build_text_encoders`."""
        return self.meta_text_encoders("text_encoder", "text_encoder_2")

    def make_decoder(self, vae: nn.Module) -> Decoder:
        """See :meth:`PipelineFamily.make_decoder`; mean and std as StableDiffusionXLPipeline applies them."""
        config: Any = vae.config
        return KLDecoder(vae, mean=config.get("latents_mean"), std=config.get("latents_std"))

    def example_conditioning(self, batch: int, height: int, width: int, dtype: torch.dtype) -> Conditioning:
        """See :meth:`Family.example_conditioning`."""
        config = self.network_config
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return Conditioning(
            {
                "prompt_embeds": _embeds(self, config, batch, ["text_encoder", "text_encoder_2"], dtype),
                "pooled_prompt_embeds": torch.empty(batch, pooled, dtype=dtype),
                "time_ids": torch.empty(batch, 6, dtype=dtype),
            }
        )


class _SD15Conditioner(Conditioner):
    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:
        from diffusers import StableDiffusionPipeline

        super().__init__()
        self.encoder = encoder
        self._pipeline = bare_pipeline(
            StableDiffusionPipeline, requires_safety_checker=False, text_encoder=encoder, tokenizer=tokenizer
        )

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        """See :meth:`Conditioner.encode_one`."""
        embeds, _ = self._pipeline.encode_prompt(prompt, next(self.encoder.parameters()).device, 1, False)
        return {"prompt_embeds": embeds[0].float()}


class _SDXLConditioner(Conditioner):
    def __init__(
        self, encoders: tuple[nn.Module, nn.Module], tokenizers: tuple[Any, Any], height: int, width: int, zeros: bool
    ) -> None:
        from diffusers import StableDiffusionXLPipeline

        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self._zeros, self._sizes = zeros, [float(n) for n in (height, width, 0, 0, height, width)]
        self._pipeline = bare_pipeline(
            StableDiffusionXLPipeline, text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
        )  # fmt: skip

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        """See :meth:`Conditioner.encode_one`."""
        device = next(self.encoders.parameters()).device
        embeds, _, pooled, _ = self._pipeline.encode_prompt(prompt, device=device, do_classifier_free_guidance=False)
        sizes = torch.tensor(self._sizes, device=device)
        return {
            "prompt_embeds": embeds[0].float(), "pooled_prompt_embeds": pooled[0].float(), "time_ids": sizes,
        }  # fmt: skip

    def unconditional_row(self) -> dict[str, Tensor]:
        """See :meth:`Conditioner.unconditional_row`."""
        row = super().unconditional_row()
        if self._zeros:
            row |= {name: torch.zeros_like(row[name]) for name in ("prompt_embeds", "pooled_prompt_embeds")}
        return row


def _embeds(family: UNetFamily, config: Config, batch: int, encoders: list[str], dtype: torch.dtype) -> Tensor:
    """Uninitialized prompt embeddings [B, L, D]."""
    texts: list[Mapping[str, Any]] = [sources.read_json(family.reference, f"{part}/config.json") for part in encoders]
    length = min(int(text.get("max_position_embeddings", 77)) for text in texts)
    return torch.empty(batch, length, config["cross_attention_dim"], dtype=dtype)
