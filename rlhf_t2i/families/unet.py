"""SDXL and Stable Diffusion 1.5: UNets on a variance-preserving schedule, conditioned by CLIP text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm.schedules import VPSchedule
from rlhf_t2i.algorithm.student import Student
from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.families import sources, weights
from rlhf_t2i.families.base import Conditioner, Conditioning, Config, Decoder
from rlhf_t2i.families.pipeline import KLDecoder, PipelineFamily
from rlhf_t2i.families.sources import ModelRef
from rlhf_t2i.families.vp_schedulers import ExportScheduler, export_scheduler

_ONE_STEP_TIMESTEP = 399.0  # DMD2's and DI*'s one-step SDXL


class UNetFamily(PipelineFamily):
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

    def check_decoder(self, source: ModelRef | None) -> None:
        """Refuse a decoder for latents of another number of channels."""
        config = self.decoder_config(source)
        channels, scale = config.get("latent_channels", 4), config.get("scaling_factor", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0:
            raise UsageError(
                f"{self._decoder_place(source)}/config.json: scaling_factor is {sources.printable(scale)}, not a "
                "positive number: the file is damaged"
            )
        if channels != self._channels:
            raise UsageError(
                f"{self._decoder_place(source)}/config.json decodes latents of {channels} channels, but the UNet has "
                f"{self._channels}: they do not belong together"
            )

    @property
    def _channels(self) -> int:
        channels = self.network_config.get("in_channels", 4)
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise UsageError(
                f"{self.reference.location}/unet/config.json: in_channels is not a number: the file is damaged"
            )
        return channels

    def native_size(self) -> tuple[int, int]:
        """The UNet's sample size times the VAE's factor."""
        size: Any = self.network_config.get("sample_size") or 128
        sides = list(size) if isinstance(size, list | tuple) else [size, size]
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise UsageError(f"{self.reference.location}/unet/config.json: sample_size is not a size: damaged")
        return sides[0] * self._factor(None), sides[1] * self._factor(None)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """See :meth:`Family.latent_shape`."""
        factor = self._factor(None)
        for name, pixels in (("height", height), ("width", width)):
            if pixels % factor:
                raise UsageError(f"models.{name}: {pixels} is not a multiple of the VAE's {factor}")
        return self._channels, height // factor, width // factor

    def _factor(self, source: ModelRef | None) -> int:
        config = self.decoder_config(source)
        levels = config.get("block_out_channels") or config.get("decoder_block_out_channels")
        if not isinstance(levels, list) or not 1 <= len(levels) <= 16:
            raise UsageError(
                f"{self._decoder_place(source)}/config.json: block_out_channels is no list: not the folder of a VAE, "
                "or damaged"
            )
        return int(2 ** (len(levels) - 1))

    def schedule(self, height: int, width: int) -> VPSchedule:
        """See :meth:`Family.schedule`; the same for every size."""
        return self._schedule

    @cached_property
    def _schedule(self) -> VPSchedule:
        place = f"{self.reference.location}/scheduler/scheduler_config.json"
        try:
            return VPSchedule.from_config(self.scheduler_config)
        except KeyError as error:
            raise UsageError(f"{place} has no {error.args[0]}: it is damaged") from None
        except (ValueError, TypeError, RuntimeError, AttributeError, OverflowError) as error:
            raise UsageError(f"{place}: {first_line(error)}") from None

    def default_timesteps(self, steps: int) -> tuple[float, ...]:
        """399 for one step; else K even parts of all timesteps (four: 999, 749, 499, 249)."""
        last = self._schedule.last
        if steps == 1:
            return (min(_ONE_STEP_TIMESTEP, last),)
        return tuple(float(int((last + 1) * (steps - i) / steps) - 1) for i in range(steps))

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

    def export_scheduler(self, student: Student) -> ExportScheduler:
        """See :meth:`PipelineFamily.export_scheduler`."""
        return export_scheduler(self.scheduler_config, student)

    def _tokenizer(self, part: str, encoder: nn.Module) -> Any:
        """A CLIP tokenizer that fits its encoder.

        AutoTokenizer would ask for a config.json that a downloaded snapshot does not hold.
        """
        from transformers import CLIPTokenizer

        tokenizer = weights.load_part(self.reference, part, CLIPTokenizer.from_pretrained)
        config: Any = encoder.config
        # Without its files transformers builds a tokenizer of a handful of tokens and says nothing.
        if not 16 <= len(tokenizer) <= config.vocab_size:
            raise UsageError(
                f"{self.reference.location}/{part} has {len(tokenizer)} tokens but the text encoder knows "
                f"{config.vocab_size}: the tokenizer's files are missing or foreign"
            )
        tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
        return tokenizer

    def _encoder(self, part: str, cls: Any, dtype: torch.dtype) -> nn.Module:
        return weights.load_part(self.reference, part, cls.from_pretrained, dtype=dtype)

    def _meta_encoder(self, part: str, cls: Any) -> nn.Module:
        with torch.device("meta"):
            return cls(cls.config_class(**sources.read_json(self.reference, f"{part}/config.json")))


class SD15Family(UNetFamily):
    """Stable Diffusion 1.5: one text encoder, its last hidden state; unconditional is the encoded empty prompt."""

    name = "sd15"
    pipelines = ("StableDiffusionPipeline",)

    def load_conditioner(self, dtype: torch.dtype, height: int, width: int) -> Conditioner:
        """See :meth:`Family.load_conditioner`."""
        from transformers import CLIPTextModel

        encoder = self._encoder("text_encoder", CLIPTextModel, dtype)
        return _SD15Conditioner(encoder, self._tokenizer("tokenizer", encoder))

    def build_text_encoders(self) -> nn.Module:
        """See :meth:`Family.build_text_encoders`."""
        from transformers import CLIPTextModel

        return nn.ModuleList([self._meta_encoder("text_encoder", CLIPTextModel)])

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
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        first = self._encoder("text_encoder", CLIPTextModel, dtype)
        second = self._encoder("text_encoder_2", CLIPTextModelWithProjection, dtype)
        tokenizers = self._tokenizer("tokenizer", first), self._tokenizer("tokenizer_2", second)
        zeros = bool(self.index.get("force_zeros_for_empty_prompt", True))
        return _SDXLConditioner((first, second), tokenizers, height, width, zeros)

    def build_text_encoders(self) -> nn.Module:
        """See :meth:`Family.build_text_encoders`."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        return nn.ModuleList([self._meta_encoder(part, cls) for part, cls in classes.items()])

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
        self.encoder = encoder.eval().requires_grad_(False)
        self._pipeline = _bare(StableDiffusionPipeline, text_encoder=encoder, tokenizer=tokenizer)

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        """See :meth:`Conditioner.encode_one`."""
        embeds, _ = self._pipeline.encode_prompt(prompt, next(self.encoder.parameters()).device, 1, False)
        return {"prompt_embeds": embeds[0].float()}

    def unconditional_row(self) -> dict[str, Tensor]:
        """See :meth:`Conditioner.unconditional_row`."""
        return {name: tensor[0] for name, tensor in self.encode([""]).tensors.items()}


class _SDXLConditioner(Conditioner):
    def __init__(
        self, encoders: tuple[nn.Module, nn.Module], tokenizers: tuple[Any, Any], height: int, width: int, zeros: bool
    ) -> None:
        from diffusers import StableDiffusionXLPipeline

        super().__init__()
        self.encoders = nn.ModuleList(encoders).eval().requires_grad_(False)
        self._zeros, self._sizes = zeros, [float(n) for n in (height, width, 0, 0, height, width)]
        self._pipeline = _bare(
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
        row = {name: tensor[0] for name, tensor in self.encode([""]).tensors.items()}
        if self._zeros:
            row |= {name: torch.zeros_like(row[name]) for name in ("prompt_embeds", "pooled_prompt_embeds")}
        return row


def _bare(cls: Any, **parts: Any) -> Any:
    """A diffusers pipeline of text encoders alone, for its ``encode_prompt``."""
    from rlhf_t2i.utils.quiet import quietly

    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    if cls.__name__ == "StableDiffusionPipeline":
        names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor")
        parts["requires_safety_checker"] = False
    with quietly():
        return cls(**dict.fromkeys(names) | parts)


def _embeds(family: UNetFamily, config: Config, batch: int, encoders: list[str], dtype: torch.dtype) -> Tensor:
    """Uninitialized prompt embeddings [B, L, D]."""
    texts: list[Mapping[str, Any]] = [sources.read_json(family.reference, f"{part}/config.json") for part in encoders]
    length = min(int(text.get("max_position_embeddings", 77)) for text in texts)
    return torch.empty(batch, length, config["cross_attention_dim"], dtype=dtype)
