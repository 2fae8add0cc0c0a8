"""Z-Image: a single-stream flow-matching transformer, conditioned by Qwen3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm.schedules import FlowSchedule
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families.base import Conditioner, Conditioning, Decoder
from rlhf_t2i.families.decoders import KLDecoder
from rlhf_t2i.families.flow_matching import FlowFamily
from rlhf_t2i.families.pipeline import bare_pipeline

_TOKENS = 512  # the pipeline's max_sequence_length


class ZImageFamily(FlowFamily):
    """Z-Image (base, and Turbo as a generator).

    The network predicts ``x_0 - eps`` and is given 1 - s. Prompts are ragged: they travel padded with a mask, and the
    network gets each at its own length. The pipeline writes guidance as ``D_c + w (D_c - D_u)``: its w is the recipe's
    ``guidance_scale`` under ``convention: one_plus``.
    """

    name = "z_image"
    pipelines = ("ZImagePipeline",)
    network_part = "transformer"
    network_class = "ZImageTransformer2DModel"
    decoder_classes = ("AutoencoderKL",)
    patch_size = 2
    block_names = ("ZImageTransformerBlock",)

    def check(self) -> None:
        """See :meth:`Family.check`."""
        self.schedule(16, 16)
        self.native_size()
        self.part_class("text_encoder")
        if 2 not in self.network_config.get("all_patch_size", [2]):
            raise UsageError(f"{self._network_place}: only patches of 2 x 2 latents are supported")

    def native_size(self) -> tuple[int, int]:
        """1024 x 1024, the pipeline's default: the network names no size."""
        return 1024, 1024

    def most_patches(self) -> int | None:
        """See :meth:`PipelineFamily.most_patches`."""
        return min(self.network_config.get("axes_lens", [1024, 512, 512])[1:])

    def schedule(self, height: int, width: int) -> FlowSchedule:
        """See :meth:`Family.schedule`."""
        return FlowSchedule(shift=self.scheduler_number("shift", 1.0), time="one_minus_sigma", sign=-1)

    def predict(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """See :meth:`Family.predict`."""
        prompts = _ragged(cond.tensors["prompt_embeds"].to(x_t.dtype), cond.tensors["prompt_mask"])
        images = list(x_t.unsqueeze(2).unbind(0))  # the network's images have a frame axis
        return torch.stack(list(network(images, time, prompts, return_dict=False)[0])).squeeze(2)

    def load_conditioner(self, dtype: torch.dtype, height: int, width: int) -> Conditioner:
        """See :meth:`Family.load_conditioner`."""
        encoder = self.text_encoder("text_encoder", dtype)
        return _ZImageConditioner(encoder, self.tokenizer("tokenizer", encoder))

    def make_decoder(self, vae: nn.Module) -> Decoder:
        """See :meth:`PipelineFamily.make_decoder`."""
        config: Any = vae.config
        return KLDecoder(vae, shift=float(config.shift_factor or 0.0))

    def example_conditioning(self, batch: int, height: int, width: int, dtype: torch.dtype) -> Conditioning:
        """See :meth:`Family.example_conditioning`; prompts of the greatest length."""
        width = self.network_config.get("cap_feat_dim", 2560)
        return Conditioning(
            {
                "prompt_embeds": torch.empty(batch, _TOKENS, width, dtype=dtype),
                "prompt_mask": torch.empty(batch, _TOKENS, dtype=torch.bool),
            }
        )


def _ragged(embeds: Tensor, mask: Tensor) -> list[Tensor]:
    """The prompts of a padded batch, each at its own length; at full length on the meta device, which has no mask."""
    return list(embeds) if mask.is_meta else [row[kept] for row, kept in zip(embeds, mask, strict=True)]


class _ZImageConditioner(Conditioner):
    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:
        from diffusers import ZImagePipeline

        super().__init__()
        self.encoder = encoder
        self._pipeline = bare_pipeline(ZImagePipeline, text_encoder=encoder, tokenizer=tokenizer)

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        """See :meth:`Conditioner.encode_one`."""
        device = next(self.encoder.parameters()).device
        # A list of its own: the pipeline writes the chat template into the one it is given.
        (embeds,), _ = self._pipeline.encode_prompt([prompt], device=device, do_classifier_free_guidance=False)
        padding = _TOKENS - len(embeds)
        mask = torch.arange(_TOKENS, device=device) < len(embeds)
        return {"prompt_embeds": nn.functional.pad(embeds.float(), (0, 0, 0, padding)), "prompt_mask": mask}
