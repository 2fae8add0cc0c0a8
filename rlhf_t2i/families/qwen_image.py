"""Qwen-Image: a flow-matching transformer on packed latents of a video autoencoder, conditioned by Qwen2.5-VL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families.base import Conditioning, Config, Decoder, NetworkCall
from rlhf_t2i.families.conditioning import padded
from rlhf_t2i.families.flow_matching import JOINT_ATTENTION, PackedFlowFamily
from rlhf_t2i.families.one_frame import OneFrameDecoder
from rlhf_t2i.families.sources import ModelRef

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_EMPTY = " "  # the negative prompt of the published examples, which is no empty string


class QwenImageFamily(PackedFlowFamily):
    """Qwen-Image.

    The network predicts ``eps - x_0`` of latents packed into tokens of 2 x 2, and is given s. Prompts are ragged: they
    travel padded with a mask, and a batch is cut to its longest one, as in the pipeline. The pipeline rescales every
    token of the guided prediction to the norm of the conditional one; training differentiates the linear form.
    """

    name = "qwen_image"
    pipelines = ("QwenImagePipeline",)
    network_class = "QwenImageTransformer2DModel"
    decoder_classes = ("AutoencoderKLQwenImage",)
    block_names = ("QwenImageTransformerBlock",)
    adapter_targets = JOINT_ATTENTION

    def check(self) -> None:
        """See :meth:`Family.check`."""
        super().check()
        for key in ("guidance_embeds", "use_additional_t_cond"):
            if self.network_config.get(key):
                raise UsageError(f"{self._network_place}: {key} is true, an input that a QwenImagePipeline cannot give")

    def latents_of(self, config: Config) -> object:
        """See :meth:`PipelineFamily.latents_of`."""
        return config.get("z_dim", 16)

    def _factor(self, source: ModelRef | None) -> int:
        halvings = self.decoder_config(source).get("temperal_downsample", [False, True, True])
        if not isinstance(halvings, list) or not 1 <= len(halvings) <= 16:
            raise UsageError(f"{self._decoder_place(source)}/config.json: temperal_downsample is no list: damaged")
        return int(2 ** len(halvings))

    def build_network(self) -> nn.Module:
        """See :meth:`Family.build_network`; with its rotary frequencies, which no state dict holds."""
        network = super().build_network()
        rope = network.pos_embed
        with torch.device("cpu"):
            network.pos_embed = type(rope)(rope.theta, rope.axes_dim, rope.scale_rope)
        return network

    def predict(self, network: NetworkCall, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """See :meth:`Family.predict`."""
        count, _, h, w = x_t.shape
        embeds, mask = _cut(cond.tensors["prompt_embeds"].to(x_t.dtype), cond.tensors["prompt_mask"])
        packed = network(
            hidden_states=self.to_scheduler(x_t.contiguous()),
            timestep=time,
            encoder_hidden_states_mask=mask,
            encoder_hidden_states=embeds,
            img_shapes=[[(1, h // 2, w // 2)]] * count,
            return_dict=False,
        )[0]
        factor = self._factor(None)
        return self.from_scheduler(packed, h * factor, w * factor)

    def pipeline_guidance(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """See :meth:`Family.pipeline_guidance`; every token keeps the norm of the conditional prediction."""
        height, width = (side * self._factor(None) for side in conditional.shape[2:])
        kept = self.to_scheduler(conditional)
        guided = self.to_scheduler(super().pipeline_guidance(conditional, unconditional, scale))
        guided = guided * (kept.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return self.from_scheduler(guided, height, width)

    def sampling_call(self, steps: int, scale: float, batch: int = 1) -> dict[str, object]:
        """See :meth:`Family.sampling_call`."""
        return {"true_cfg_scale": scale, "negative_prompt": [_EMPTY] * batch}

    def plain_call(self, steps: int) -> dict[str, object]:
        """See :meth:`Family.plain_call`; without a negative prompt nothing is guided."""
        return {"true_cfg_scale": 1.0}

    def encode_prompt(self, pipeline: DiffusionPipeline, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """See :meth:`PromptFamily.encode_prompt`."""
        (embeds,), _ = pipeline.encode_prompt(prompt, device=device, max_sequence_length=self.prompt_tokens)
        return padded(embeds, self.prompt_tokens)

    def encode_unconditional(self, pipeline: DiffusionPipeline, device: torch.device) -> dict[str, Tensor]:
        """See :meth:`PromptFamily.encode_unconditional`."""
        return self.encode_prompt(pipeline, _EMPTY, device)

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`PromptFamily.conditioning_shapes`."""
        tokens = self.prompt_tokens
        return {"prompt_embeds": (tokens, self.network_config["joint_attention_dim"]), "prompt_mask": (tokens,)}

    def make_decoder(self, vae: nn.Module) -> Decoder:
        """See :meth:`PipelineFamily.make_decoder`."""
        return OneFrameDecoder(vae)


def _cut(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """A padded batch at the length of its longest prompt; no mask where all are as long, or on the meta device."""
    if mask.is_meta:
        return embeds, None
    longest = int(mask.sum(1).max())
    mask = mask[:, :longest]
    return embeds[:, :longest], None if bool(mask.all()) else mask
