"""PixArt-alpha and PixArt-Sigma: transformers on a variance-preserving schedule, conditioned by T5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_t2i.families.base import Conditioner, Conditioning, Decoder
from rlhf_t2i.families.decoders import KLDecoder
from rlhf_t2i.families.pipeline import bare_pipeline
from rlhf_t2i.families.variance_preserving import VPFamily

_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""The pipelines' max_sequence_length: every prompt is padded to it, and the padding masked."""


class PixArtFamily(VPFamily):
    """PixArt-alpha and PixArt-Sigma.

    The network predicts eps and its variance, which is not used here. PixArt-alpha's 1024 px network is also told the
    image's size and aspect ratio. The unconditional branch is the encoded empty prompt.
    """

    name = "pixart"
    pipelines = tuple(_TOKENS)
    network_part = "transformer"
    network_class = "PixArtTransformer2DModel"
    decoder_classes = ("AutoencoderKL", "AutoencoderTiny")
    patch_size = 2
    block_names = ("BasicTransformerBlock",)

    def check(self) -> None:
        """See :meth:`Family.check`."""
        self.schedule(0, 0)
        self.native_size()
        self.part_class("text_encoder")

    def predict(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """See :meth:`Family.predict`; the first half of the network's output."""
        tensors = cond.tensors
        sizes = {key: tensors[key].to(x_t.dtype) if key in tensors else None for key in ("resolution", "aspect_ratio")}
        output = network(
            x_t,
            encoder_hidden_states=tensors["prompt_embeds"].to(x_t.dtype),
            encoder_attention_mask=tensors["prompt_mask"],
            timestep=time,
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]

    def plain_call(self, steps: int) -> dict[str, Any]:
        """See :meth:`Family.plain_call`.

        Prompts are encoded as they are: what the pipeline's own cleaning does depends on the packages installed.
        """
        return {"guidance_scale": 0.0, "clean_caption": False, "use_resolution_binning": False}

    def load_conditioner(self, dtype: torch.dtype, height: int, width: int) -> Conditioner:
        """See :meth:`Family.load_conditioner`."""
        encoder = self.text_encoder("text_encoder", dtype)
        return _PixArtConditioner(
            encoder, self.tokenizer("tokenizer", encoder), self._tokens, self._sizes(height, width)
        )

    @property
    def _tokens(self) -> int:
        return _TOKENS[self.index["_class_name"]]

    def _sizes(self, height: int, width: int) -> dict[str, Tensor]:
        """The micro-conditions that the pipeline passes, by name."""
        if self.index["_class_name"] != "PixArtAlphaPipeline" or self.network_config.get("sample_size", 128) != 128:
            return {}
        return {"resolution": torch.tensor([height, width]).float(), "aspect_ratio": torch.tensor([height / width])}

    def make_decoder(self, vae: nn.Module) -> Decoder:
        """See :meth:`PipelineFamily.make_decoder`."""
        return KLDecoder(vae)

    def example_conditioning(self, batch: int, height: int, width: int, dtype: torch.dtype) -> Conditioning:
        """See :meth:`Family.example_conditioning`."""
        embeds = torch.empty(batch, self._tokens, self.network_config["caption_channels"], dtype=dtype)
        sizes = {
            name: torch.empty(batch, len(value), dtype=dtype) for name, value in self._sizes(height, width).items()
        }
        return Conditioning({"prompt_embeds": embeds, "prompt_mask": torch.empty(embeds.shape[:2]), **sizes})


class _PixArtConditioner(Conditioner):
    def __init__(self, encoder: nn.Module, tokenizer: Any, tokens: int, sizes: dict[str, Tensor]) -> None:
        from diffusers import PixArtAlphaPipeline

        super().__init__()
        self.encoder, self._tokens, self._sizes = encoder, tokens, sizes
        self._pipeline = bare_pipeline(PixArtAlphaPipeline, text_encoder=encoder, tokenizer=tokenizer)

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        """See :meth:`Conditioner.encode_one`."""
        device = next(self.encoder.parameters()).device
        embeds, mask, _, _ = self._pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, device=device, max_sequence_length=self._tokens
        )
        sizes = {name: value.to(device) for name, value in self._sizes.items()}
        return {"prompt_embeds": embeds[0].float(), "prompt_mask": mask[0].float(), **sizes}
