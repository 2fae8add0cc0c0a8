"""PickScore (Kirstain et al. 2023, arXiv:2305.01569): CLIP ViT-H/14 trained on people's choices between images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from rlhf_t2i_plugins.rewards.clip_model import check_clip, clip_footprint, has_processor, load_clip
from torch import Tensor

from rlhf_t2i import plugins
from rlhf_t2i.families import sources

_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScoreOptions(plugins.Options):
    """Where the model is and the unit of the score."""

    model: str = Field("yuvalkirstain/PickScore_v1", description="hub id or local folder (transformers CLIPModel)")
    processor: str | None = Field(None, description=f"tokenizer and image processor; {_PROCESSOR} when absent there")
    unit: Literal["cosine", "logit"] = Field("cosine", description="logit multiplies by the learned scale (about 100)")


class PickScore(plugins.Reward):
    """Cosine between image and prompt, about 0.18 to 0.26 for the published model; a logit is 100 times that.

    License of PickScore_v1: MIT.
    """

    Options = PickScoreOptions
    options: PickScoreOptions
    unit = "cosine"
    value_range = (-1.0, 1.0)
    license = "MIT"

    def __init__(self, options: PickScoreOptions | None = None) -> None:
        super().__init__(options)
        self.clip = load_clip(self.options.model, self.options.processor, _PROCESSOR)
        # Read in float32: in bfloat16 the scale would be off by up to 1%.
        self._scale = float(self.clip.logit_scale()) if self.options.unit == "logit" else 1.0
        self.value_range = (-self._scale, self._scale)

    @classmethod
    def preflight(cls, options: PickScoreOptions) -> None:
        """Refuse a model that is no CLIP, and a processor of another model."""
        check_clip(options.model, options.processor, _PROCESSOR)

    @classmethod
    def hub_models(cls, options: PickScoreOptions) -> list[str]:
        """See :meth:`rlhf_t2i.plugins.Reward.hub_models`."""
        own = options.processor or has_processor(sources.parse(options.model))
        return [*super().hub_models(options), *([] if own else [_PROCESSOR])]

    @classmethod
    def footprint(cls, options: PickScoreOptions) -> plugins.Footprint | None:
        """See :meth:`rlhf_t2i.plugins.Reward.footprint`."""
        return clip_footprint(options.model)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit text vectors [B, D]."""
        return self.clip.text_features(prompts)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine, or logit, of images [B, 3, H, W] in [0, 1] and their prompts [B]."""
        cosine = (self.clip.image_features(images) * self.text_features(prompts)).sum(-1)
        return cosine * self._scale
