"""PixArt-alpha and PixArt-Sigma: transformers on a variance-preserving schedule, conditioned by T5."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_t2i.families.base import Conditioning, NetworkCall
from rlhf_t2i.families.variance_preserving import VPFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class PixArtFamily(VPFamily):
    """PixArt-alpha and PixArt-Sigma.

    The network predicts eps and its variance, which is not used here. PixArt-alpha's 1024 px network is also told the
    image's size and aspect ratio. Every prompt is padded to the pipeline's ``max_sequence_length``, and the padding
    masked. The unconditional branch is the encoded empty prompt.
    """

    name = "pixart"
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    network_part = "transformer"
    network_class = "PixArtTransformer2DModel"
    patch_size = 2
    block_names = ("BasicTransformerBlock",)

    def predict(self, network: NetworkCall, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
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

    def plain_call(self, steps: int) -> dict[str, object]:
        """See :meth:`Family.plain_call`.

        Prompts are encoded as they are: what the pipeline's own cleaning does depends on the packages installed.
        """
        return {"guidance_scale": 0.0, "clean_caption": False, "use_resolution_binning": False}

    def encode_prompt(self, pipeline: DiffusionPipeline, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """See :meth:`PromptFamily.encode_prompt`."""
        embeds, mask, _, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, device=device)
        return {"prompt_embeds": embeds[0].float(), "prompt_mask": mask[0].float()}

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`PromptFamily.conditioning_shapes`."""
        tokens = self.prompt_tokens
        return {"prompt_embeds": (tokens, self.network_config["caption_channels"]), "prompt_mask": (tokens,)}

    def constant_conditioning(self, height: int, width: int) -> dict[str, Tensor]:
        """The micro-conditions that the pipeline passes; see :meth:`PromptFamily.constant_conditioning`."""
        if self.index["_class_name"] != "PixArtAlphaPipeline" or self.network_config.get("sample_size", 128) != 128:
            return {}
        return {"resolution": torch.tensor([height, width]).float(), "aspect_ratio": torch.tensor([height / width])}
