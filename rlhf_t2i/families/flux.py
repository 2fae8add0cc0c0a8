"""FLUX.1 (dev and schnell): a flow-matching transformer on packed latents, conditioned by CLIP and T5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_t2i.families.base import Conditioner, Conditioning, Decoder
from rlhf_t2i.families.decoders import KLDecoder
from rlhf_t2i.families.flow_matching import PackedFlowFamily
from rlhf_t2i.families.pipeline import bare_pipeline

_T5_TOKENS = 512  # the pipeline's max_sequence_length
_EMBEDDED_GUIDANCE = 3.5  # the pipeline's guidance_scale, which dev reads as an input


class FluxFamily(PackedFlowFamily):
    """FLUX.1-dev and FLUX.1-schnell.

    The network predicts ``eps - x_0`` of latents packed into tokens of 2 x 2, and is given s. dev reads a guidance
    scale as an input (3.5 here, for every role): its score is that of guided samples, not of the data. Guidance by the
    recipe's ``cfg`` comes on top, as the pipeline's ``true_cfg_scale``.
    """

    name = "flux"
    pipelines = ("FluxPipeline",)
    network_part = "transformer"
    network_class = "FluxTransformer2DModel"
    decoder_classes = ("AutoencoderKL",)
    block_names = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    adapter_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip

    def check(self) -> None:
        """See :meth:`Family.check`."""
        self.schedule(16, 16)
        for part in ("text_encoder", "text_encoder_2"):
            self.part_class(part)

    def predict(self, network: Any, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
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

    def load_conditioner(self, dtype: torch.dtype, height: int, width: int) -> Conditioner:
        """See :meth:`Family.load_conditioner`."""
        clip, t5 = (self.text_encoder(part, dtype) for part in ("text_encoder", "text_encoder_2"))
        tokenizers = self.tokenizer("tokenizer", clip), self.tokenizer("tokenizer_2", t5)
        return _FluxConditioner((clip, t5), tokenizers, self._reads_guidance)

    @property
    def _reads_guidance(self) -> bool:
        return bool(self.network_config.get("guidance_embeds", False))

    def build_text_encoders(self) -> nn.Module:
        """See :meth:`Family.build_text_encoders`."""
        return self.meta_text_encoders("text_encoder", "text_encoder_2")

    def make_decoder(self, vae: nn.Module) -> Decoder:
        """See :meth:`PipelineFamily.make_decoder`."""
        config: Any = vae.config
        return KLDecoder(vae, shift=float(config.shift_factor or 0.0))

    def example_conditioning(self, batch: int, height: int, width: int, dtype: torch.dtype) -> Conditioning:
        """See :meth:`Family.example_conditioning`."""
        config = self.network_config
        tensors = {
            "prompt_embeds": torch.empty(batch, _T5_TOKENS, config["joint_attention_dim"], dtype=dtype),
            "pooled_prompt_embeds": torch.empty(batch, config["pooled_projection_dim"], dtype=dtype),
        }
        return Conditioning(tensors | ({"guidance": torch.empty(batch)} if self._reads_guidance else {}))

    def guided_call(self, steps: int, scale: float) -> dict[str, Any]:
        """See :meth:`Family.guided_call`."""
        return {"guidance_scale": _EMBEDDED_GUIDANCE, "true_cfg_scale": scale, "negative_prompt": ""}

    def plain_call(self, steps: int) -> dict[str, Any]:
        """See :meth:`Family.plain_call`; without ``guidance_scale`` the pipeline passes its own 3.5."""
        return {"guidance_scale": _EMBEDDED_GUIDANCE}


class _FluxConditioner(Conditioner):
    def __init__(self, encoders: tuple[nn.Module, nn.Module], tokenizers: tuple[Any, Any], guidance: bool) -> None:
        from diffusers import FluxPipeline

        super().__init__()
        self.encoders, self._guidance = nn.ModuleList(encoders), guidance
        self._pipeline = bare_pipeline(
            FluxPipeline, text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
        )  # fmt: skip

    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        """See :meth:`Conditioner.encode_one`."""
        device = next(self.encoders.parameters()).device
        embeds, pooled, _ = self._pipeline.encode_prompt(prompt, device=device, max_sequence_length=_T5_TOKENS)
        row = {"prompt_embeds": embeds[0].float(), "pooled_prompt_embeds": pooled[0].float()}
        return row | ({"guidance": torch.tensor(_EMBEDDED_GUIDANCE, device=device)} if self._guidance else {})
