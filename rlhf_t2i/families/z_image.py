"""Z-Image: a single-stream flow-matching transformer, conditioned by Qwen3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_t2i.algorithm.schedules import FlowSchedule
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families.base import Conditioning, NetworkCall
from rlhf_t2i.families.conditioning import padded
from rlhf_t2i.families.flow_matching import FlowFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class ZImageFamily(FlowFamily):
    """Z-Image (base, and Turbo as a generator).

    The network predicts ``x_0 - eps`` and is given 1 - s. Prompts are ragged: they travel padded with a mask, and the
    network gets each at its own length. The pipeline writes guidance as ``D_c + w (D_c - D_u)``: its w is the recipe's
    ``guidance_scale`` under ``convention: one_plus``.
    """

    name = "z_image"
    convention = "one_plus"
    pipelines = ("ZImagePipeline",)
    network_class = "ZImageTransformer2DModel"
    block_names = ("ZImageTransformerBlock",)

    def check(self) -> None:
        """See :meth:`Family.check`."""
        super().check()
        if 2 not in self.network_config.get("all_patch_size", [2]):
            raise UsageError(f"{self._network_place}: only patches of 2 x 2 latents are supported")

    def most_patches(self) -> int | None:
        """See :meth:`PipelineFamily.most_patches`."""
        return min(self.network_config.get("axes_lens", [1024, 512, 512])[1:])

    def schedule(self, height: int, width: int) -> FlowSchedule:
        """See :meth:`Family.schedule`."""
        side = 2 * self._factor(None)  # of a token, in pixels
        shift = self.dynamic_shift((height // side) * (width // side))
        return FlowSchedule(shift=shift, time="one_minus_sigma", sign=-1)

    def predict(self, network: NetworkCall, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """See :meth:`Family.predict`."""
        prompts = _ragged(cond.tensors["prompt_embeds"].to(x_t.dtype), cond.tensors["prompt_mask"])
        images = list(x_t.unsqueeze(2).unbind(0))  # the network's images have a frame axis
        return torch.stack(list(network(images, time, prompts, return_dict=False)[0])).squeeze(2)

    def encode_prompt(self, pipeline: DiffusionPipeline, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """See :meth:`PromptFamily.encode_prompt`."""
        # A list of its own: the pipeline writes the chat template into the one it is given.
        (embeds,), _ = pipeline.encode_prompt([prompt], device=device, do_classifier_free_guidance=False)
        return padded(embeds, self.prompt_tokens)

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`PromptFamily.conditioning_shapes`."""
        tokens = self.prompt_tokens
        return {"prompt_embeds": (tokens, self.network_config.get("cap_feat_dim", 2560)), "prompt_mask": (tokens,)}


def _ragged(embeds: Tensor, mask: Tensor) -> list[Tensor]:
    """The prompts of a padded batch, each at its own length; at full length on the meta device, which has no mask."""
    return list(embeds) if mask.is_meta else [row[kept] for row, kept in zip(embeds, mask, strict=True)]
