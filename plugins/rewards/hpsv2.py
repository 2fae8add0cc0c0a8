"""HPSv2 and HPSv2.1 (Wu et al. 2023, arXiv:2306.09341): an open_clip ViT-H/14 tuned on people's rankings of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rlhf_t2i_plugins.rewards.checkpoints import find_file, load_open_clip, open_clip_footprint
from rlhf_t2i_plugins.rewards.clip_model import ClipScorer, clip_footprint, has_tokenizer, load_tokenizer
from torch import Tensor

from rlhf_t2i import plugins
from rlhf_t2i.families import sources
from rlhf_t2i.plugins.preprocessing import Preprocess

_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_FILES = {"v2.1": "HPS_v2.1_compressed.pt", "v2.0": "HPS_v2_compressed.pt"}


class HPSv2Options(plugins.Options):
    """Where the checkpoint is and which version."""

    model: str = Field("xswu/HPSv2", description="hub id, folder or file of the checkpoint")
    version: Literal["v2.1", "v2.0"] = Field("v2.1", description="which checkpoint of the folder")
    tokenizer: str | None = Field(None, description="CLIP tokenizer; LAION's ViT-H-14 when the folder has none")


class HPSv2(plugins.Reward):
    """Cosine between image and prompt, about 0.2 to 0.35 for the published model.

    Images that are not square are shrunk and framed with black, as in the original code. License of the weights:
    Apache-2.0.
    """

    Options = HPSv2Options
    options: HPSv2Options
    unit = "cosine"
    value_range = (-1.0, 1.0)
    license = "Apache-2.0"

    def __init__(self, options: HPSv2Options | None = None) -> None:
        super().__init__(options)
        source = sources.parse(self.options.model)
        network = plugins.shared(_network, find_file(source, [_FILES[self.options.version]]))
        where = self.options.tokenizer or _TOKENIZER
        place = source if self.options.tokenizer is None and has_tokenizer(source) else sources.parse(where)
        tokenizer = load_tokenizer(place, network.config.text_config.vocab_size)
        size = network.config.vision_config.image_size
        # The original resizes a float tensor, so the filter's overshoot stays.
        self.clip = ClipScorer(network, tokenizer, Preprocess.square(size, pad=True, clamp=False))

    @classmethod
    def preflight(cls, options: HPSv2Options) -> None:
        """Refuse a local folder that lacks its files."""
        source = sources.parse(options.model)
        if source.is_local:
            find_file(source, [_FILES[options.version]])

    @classmethod
    def hub_models(cls, options: HPSv2Options) -> list[str]:
        """See :meth:`rlhf_t2i.plugins.Reward.hub_models`."""
        own = options.tokenizer or has_tokenizer(sources.parse(options.model))
        return [*super().hub_models(options), *([] if own else [_TOKENIZER])]

    @classmethod
    def footprint(cls, options: HPSv2Options) -> plugins.Footprint | None:
        """See :meth:`rlhf_t2i.plugins.Reward.footprint`."""
        source = sources.parse(options.model)
        if source.is_local:
            return open_clip_footprint(find_file(source, [_FILES[options.version]]))
        return clip_footprint(_TOKENIZER)  # the published checkpoints are ViT-H/14s

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit text vectors [B, D]."""
        return self.clip.text_features(prompts)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of images [B, 3, H, W] in [0, 1] and their prompts [B]."""
        return (self.clip.image_features(images) * self.text_features(prompts)).sum(-1)


def _network(path: Path) -> Any:
    return load_open_clip(path)
