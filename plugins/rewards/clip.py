"""CLIP score (Radford et al. 2021, arXiv:2103.00020), for transformers' CLIP folders and open_clip's models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator
from rlhf_t2i_plugins.rewards.checkpoints import load_open_clip, open_clip_footprint
from rlhf_t2i_plugins.rewards.clip_model import (
    ClipScorer,
    check_clip,
    clip_footprint,
    load_clip,
    load_tokenizer,
    unit_rows,
)
from torch import Tensor, nn

from rlhf_t2i import plugins
from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.families import sources
from rlhf_t2i.plugins.preprocessing import Preprocess
from rlhf_t2i.utils import files

_OPENAI = "openai/clip-vit-large-patch14"
# The pretrained tags whose weights are also published in transformers' layout: these need no open_clip.
_PUBLISHED = {
    ("ViT-B-32", "openai"): "openai/clip-vit-base-patch32",
    ("ViT-B-16", "openai"): "openai/clip-vit-base-patch16",
    ("ViT-L-14", "openai"): _OPENAI,
    ("ViT-L-14-336", "openai"): "openai/clip-vit-large-patch14-336",
    ("ViT-B-32", "laion2b_s34b_b79k"): "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    ("ViT-B-16", "laion2b_s34b_b88k"): "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
    ("ViT-L-14", "laion2b_s32b_b82k"): "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    ("ViT-H-14", "laion2b_s32b_b79k"): "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ("ViT-g-14", "laion2b_s12b_b42k"): "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    ("ViT-bigG-14", "laion2b_s39b_b160k"): "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
}


class CLIPOptions(plugins.Options):
    """A transformers CLIP by ``model``, or an open_clip model by ``open_clip`` and ``pretrained``."""

    model: str = Field(_OPENAI, description="hub id or local folder (transformers CLIPModel)")
    open_clip: str | None = Field(None, description="an open_clip model name, e.g. ViT-H-14; needs pretrained")
    pretrained: str | None = Field(None, description="open_clip's tag, e.g. laion2b_s32b_b79k, or a checkpoint file")
    tokenizer: str | None = Field(None, description="for an open_clip file: folder or hub id of a CLIP tokenizer")
    unit: Literal["cosine", "logit"] = Field("cosine", description="logit multiplies by the learned scale (about 100)")

    @model_validator(mode="after")
    def _one_source(self) -> CLIPOptions:
        if (self.open_clip is None) != (self.pretrained is None):
            raise ValueError("open_clip and pretrained go together")
        if self.open_clip is not None and "model" in self.model_fields_set:
            raise ValueError("give either model or open_clip, not both")
        return self


class CLIPReward(plugins.Reward):
    """Cosine between image and prompt: about 0.15 to 0.4 (the usual "CLIP score" is 100 times that).

    License: OpenAI's and LAION's weights MIT.
    """

    Options = CLIPOptions
    options: CLIPOptions
    unit = "cosine"
    value_range = (-1.0, 1.0)
    license = "MIT"

    def __init__(self, options: CLIPOptions | None = None) -> None:
        super().__init__(options)
        self.clip = self._load()
        # Read in float32: in bfloat16 the scale would be off by up to 1%.
        self._scale = float(self.clip.logit_scale()) if self.options.unit == "logit" else 1.0
        self.value_range = (-self._scale, self._scale)

    def _load(self) -> Any:
        name, pretrained = self.options.open_clip, self.options.pretrained
        if name is None or pretrained is None:
            return load_clip(self.options.model)
        checkpoint = files.expanded(pretrained)
        if checkpoint.is_file():
            network = plugins.shared(load_open_clip, files.absolute(checkpoint), name.endswith("-quickgelu"))
            place = sources.parse(self.options.tokenizer or _OPENAI)
            tokenizer = load_tokenizer(place, network.config.text_config.vocab_size)
            size = network.config.vision_config.image_size
            return ClipScorer(network, tokenizer, Preprocess.square(size, crop_rounding="nearest"))
        if (name, pretrained) in _PUBLISHED:
            return load_clip(_PUBLISHED[name, pretrained])
        return plugins.shared(OpenClipScorer, name, pretrained)

    @classmethod
    def preflight(cls, options: CLIPOptions) -> None:
        """Refuse a model that is no CLIP, and a processor of another model."""
        if options.open_clip is None:
            check_clip(options.model)

    @classmethod
    def hub_models(cls, options: CLIPOptions) -> list[str]:
        """See :meth:`rlhf_t2i.plugins.Reward.hub_models`."""
        tag = (options.open_clip or "", options.pretrained or "")
        return [*super().hub_models(options), _PUBLISHED.get(tag, "")]

    @classmethod
    def footprint(cls, options: CLIPOptions) -> plugins.Footprint | None:
        """See :meth:`rlhf_t2i.plugins.Reward.footprint`."""
        name, pretrained = options.open_clip, options.pretrained
        if name is None or pretrained is None:
            return clip_footprint(options.model)
        checkpoint = files.expanded(pretrained)
        if checkpoint.is_file():
            return open_clip_footprint(files.absolute(checkpoint), name.endswith("-quickgelu"))
        published = _PUBLISHED.get((name, pretrained))
        return clip_footprint(published) if published else None

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit text vectors [B, D]."""
        return self.clip.text_features(prompts)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine, or logit, of images [B, 3, H, W] in [0, 1] and their prompts [B]."""
        cosine = (self.clip.image_features(images) * self.text_features(prompts)).sum(-1)
        return cosine * self._scale


class OpenClipScorer(nn.Module):
    """Any model of the open_clip library (the ``open-clip`` extra), with preprocessing that gradients pass through."""

    def __init__(self, name: str, pretrained: str) -> None:
        super().__init__()
        try:
            import open_clip
        except Exception as error:
            raise UsageError(
                f"reward 'clip': open_clip {name!r} with {pretrained!r} needs the open_clip library "
                f"(the extra open-clip: docs/install.md): {first_line(error)}"
            ) from error
        try:
            model, _, _ = open_clip.create_model_and_transforms(name, pretrained=pretrained)
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:
            raise UsageError(f"reward 'clip': open_clip cannot load {name!r}: {first_line(error)}") from error
        self.model: Any = model.eval().requires_grad_(False)
        size = model.visual.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        self.preprocess = Preprocess(
            resize=size[0] if size[0] == size[1] else size,
            crop=size,
            mean=tuple(model.visual.image_mean),
            std=tuple(model.visual.image_std),
            crop_rounding="nearest",
        )

    def image_features(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D]; gradients flow."""
        pixels = self.preprocess(images)
        return unit_rows(self.model.encode_image(pixels.to(self.model.logit_scale.dtype)))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [B, D]."""
        return unit_rows(self.model.encode_text(self.tokenizer(list(prompts)).to(self.model.logit_scale.device)))

    def logit_scale(self) -> Tensor:
        """The learned inverse temperature."""
        return self.model.logit_scale.exp()
