"""The LAION aesthetic predictor v2 (Schuhmann 2022): CLIP ViT-L/14 and a linear head; it does not read the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from rlhf_t2i_plugins.rewards.checkpoints import find_file, load_exactly, read_state
from rlhf_t2i_plugins.rewards.clip_model import check_clip, clip_footprint, load_clip
from rlhf_t2i_plugins.rewards.regression_head import RegressionHead
from torch import Tensor

from rlhf_t2i import plugins
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import sources

_FILES = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.safetensors")


class AestheticOptions(plugins.Options):
    """Where the CLIP and the head are."""

    model: str = Field("openai/clip-vit-large-patch14", description="hub id or local folder (transformers CLIPModel)")
    head: str = Field(
        "trl-lib/ddpo-aesthetic-predictor", description=f"hub id, folder or file of the head: {', '.join(_FILES)}"
    )


class Aesthetic(plugins.Reward):
    """Predicted mean rating of an image's looks, about 1 to 10; most generated images get 4 to 7.

    License: the predictor Apache-2.0, CLIP ViT-L/14 MIT.
    """

    Options = AestheticOptions
    options: AestheticOptions
    unit = "rating"
    license = "Apache-2.0 (head), MIT (CLIP)"
    uses_prompt = False

    def __init__(self, options: AestheticOptions | None = None) -> None:
        super().__init__(options)
        self.clip = load_clip(self.options.model)
        path = find_file(sources.parse(self.options.head), _FILES)
        state = read_state(path)
        first = state.get("layers.0.weight", torch.empty(0, 0))
        width = self.clip.model.config.projection_dim
        if first.shape[-1] != width:
            raise UsageError(f"{path} reads {first.shape[-1]} features but {self.options.model} gives {width}")
        self.head = RegressionHead(width)
        load_exactly(self.head, state, path)

    @classmethod
    def preflight(cls, options: AestheticOptions) -> None:
        """Refuse a model that is no CLIP, a processor of another model, and a folder without the head."""
        check_clip(options.model)
        if (head := sources.parse(options.head)).is_local:
            find_file(head, _FILES)

    @classmethod
    def footprint(cls, options: AestheticOptions) -> plugins.Footprint | None:
        """See :meth:`rlhf_t2i.plugins.Reward.footprint`."""
        return clip_footprint(options.model, RegressionHead)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Rating of images [B, 3, H, W] in [0, 1]; prompts are not read."""
        return self.head(self.clip.image_features(images))
