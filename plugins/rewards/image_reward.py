"""ImageReward-v1.0 (Xu et al. 2023, arXiv:2304.05977) on transformers' own BLIP classes.

The package image-reward does not import beside a current transformers; its published checkpoint fits transformers'
BLIP weight for weight, and gives the same scores and gradients (tests/rewards/fixtures/README.md).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from rlhf_t2i_plugins.rewards.checkpoints import State, find_file, load_exactly, read_state
from rlhf_t2i_plugins.rewards.clip_model import has_tokenizer, load_tokenizer
from rlhf_t2i_plugins.rewards.regression_head import RegressionHead
from torch import Tensor, nn

from rlhf_t2i import plugins
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import sources
from rlhf_t2i.plugins.preprocessing import Preprocess

# The mean and standard deviation over the authors' training set, from their code.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
_MAX_TOKENS = 35
_TOKENIZER = "google-bert/bert-base-uncased"
_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"^norm\.", "post_layernorm."),
)


_FILES = ("ImageReward.pt", "ImageReward.safetensors")


class ImageRewardOptions(plugins.Options):
    """Where the checkpoint and the tokenizer are."""

    model: str = Field("THUDM/ImageReward", description="hub id or folder with ImageReward.pt and med_config.json")
    tokenizer: str | None = Field(None, description="BERT tokenizer; bert-base-uncased when the folder has none")


class ImageReward(plugins.Reward):
    """People's preference, standardized over the authors' data: mean 0, standard deviation 1, about -2.3 to 2.

    Prompts are cut to 35 tokens. License of the weights: Apache-2.0.
    """

    Options = ImageRewardOptions
    options: ImageRewardOptions
    unit = "std"
    license = "Apache-2.0"

    def __init__(self, options: ImageRewardOptions | None = None) -> None:
        super().__init__(options)
        source = sources.parse(self.options.model)
        path = find_file(source, _FILES)
        state = read_state(path)
        vision = rename_vision(state)
        text = _below(state, "blip.text_encoder.")
        text = {name: tensor for name, tensor in text.items() if not name.endswith("position_ids")}
        med = sources.read_json(sources.ModelRef(str(path.parent)) if source.is_local else source, "med_config.json")
        try:
            self.vision, self.text = build_blip(vision, text, med)
        except KeyError as error:
            raise UsageError(f"{path} is not an ImageReward checkpoint: it has no {error}") from error
        load_exactly(self.vision, vision, path)
        load_exactly(self.text, text, path)
        self.head = RegressionHead(self.text.config.hidden_size)
        load_exactly(self.head, _below(state, "mlp."), path)
        self.tokenizer = self._load_tokenizer(source)
        self.preprocess = Preprocess.square(self.vision.config.image_size, crop_rounding="nearest")

    def _load_tokenizer(self, source: sources.ModelRef) -> Any:
        place = source if self.options.tokenizer is None and has_tokenizer(source) else None
        if place is None:
            place = sources.parse(self.options.tokenizer or _TOKENIZER)
        tokenizer = load_tokenizer(place, self.text.config.vocab_size)
        # BLIP's vocabulary: two more tokens, so that a prompt with these words is read as in the original.
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.add_tokens(["[ENC]"], special_tokens=True)
        if len(tokenizer) != self.text.config.vocab_size:
            raise UsageError(
                f"the tokenizer of {place.location} has {len(tokenizer)} tokens with BLIP's two; "
                f"the model knows {self.text.config.vocab_size}"
            )
        return tokenizer

    @classmethod
    def preflight(cls, options: ImageRewardOptions) -> None:
        """Refuse a local folder that lacks its files."""
        source = sources.parse(options.model)
        if source.is_local:
            place = find_file(source, _FILES).parent
            sources.read_json(sources.ModelRef(str(place)), "med_config.json")

    @classmethod
    def hub_models(cls, options: ImageRewardOptions) -> list[str]:
        """See :meth:`rlhf_t2i.plugins.Reward.hub_models`."""
        own = options.tokenizer or has_tokenizer(sources.parse(options.model))
        return [*super().hub_models(options), *([] if own else [_TOKENIZER])]

    @classmethod
    def footprint(cls, options: ImageRewardOptions) -> plugins.Footprint | None:
        """See :meth:`rlhf_t2i.plugins.Reward.footprint`."""
        return plugins.Footprint(options.model, _Layers)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Token ids and mask [B, 2, 35]: the text encoder itself looks at the image, so only these can be cached."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        )
        device = self.head.layers[0].weight.device
        return torch.stack([tokens.input_ids, tokens.attention_mask], dim=1).to(device)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Standardized preference of images [B, 3, H, W] in [0, 1] for their prompts [B]."""
        ids, mask = self.text_features(prompts).unbind(1)
        pixels = self.preprocess(images).to(self.vision.embeddings.class_embedding.dtype)
        patches = self.vision(pixel_values=pixels).last_hidden_state
        output = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device),
            # The configuration says decoder, so that cross-attention exists; attention here goes both ways.
            is_decoder=False,
        )
        return (self.head(output.last_hidden_state[:, 0]) - MEAN) / STD


_SHAPES = (
    {
        "embeddings.patch_embedding.weight": (1024, 3, 16, 16),
        "embeddings.position_embedding": (1, 197, 1024),
        "encoder.layers.0.mlp.fc1.weight": (4096, 1024),
        "encoder.layers.23.layer_norm1.weight": (1024,),
    },
    {
        "embeddings.word_embeddings.weight": (30524, 768),
        "encoder.layer.0.intermediate.dense.weight": (3072, 768),
        "encoder.layer.11.output.dense.bias": (768,),
        "embeddings.position_embeddings.weight": (512, 768),
    },
)
"""The weights of the published checkpoint from which :func:`build_blip` reads sizes."""


class _Layers(nn.Module):
    """ImageReward at its published size without weights, for its footprint."""

    def __init__(self) -> None:
        super().__init__()
        vision, text = ({name: torch.empty(shape) for name, shape in shapes.items()} for shapes in _SHAPES)
        self.vision, self.text = build_blip(vision, text, {})
        self.head = RegressionHead(self.text.config.hidden_size)
        self.preprocess = Preprocess.square(self.vision.config.image_size)

    def forward(self, images: Tensor) -> Tensor:
        """A number for each of the images [B, 3, H, W] in [0, 1]."""
        pixels = self.preprocess(images).to(self.vision.embeddings.class_embedding.dtype)
        patches = self.vision(pixel_values=pixels).last_hidden_state
        ids = torch.zeros(len(images), _MAX_TOKENS, dtype=torch.long, device=images.device)
        output = self.text(input_ids=ids, encoder_hidden_states=patches, is_decoder=False)
        return self.head(output.last_hidden_state[:, 0])


def rename_vision(state: State) -> State:
    """The vision tower's weights of an ImageReward checkpoint, under BlipVisionModel's names."""
    renamed = {}
    for name, tensor in _below(state, "blip.visual_encoder.").items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def build_blip(vision: State, text: State, med: dict[str, Any]) -> tuple[Any, Any]:
    """Empty BlipVisionModel and BlipTextModel of a checkpoint's sizes; the text tower's heads are in med_config.json.

    The vision tower has heads of 64, a layer norm epsilon of 1e-6 and gelu, which its file does not say.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    width, _, patch, _ = vision["embeddings.patch_embedding.weight"].shape
    patches = vision["embeddings.position_embedding"].shape[1] - 1
    vision_config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(vision["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=1 + max(int(n.split(".")[2]) for n in vision if n.startswith("encoder.layers.")),
        num_attention_heads=width // 64,
        image_size=patch * round(patches**0.5),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    vocabulary, hidden = text["embeddings.word_embeddings.weight"].shape
    text_config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        encoder_hidden_size=width,
        intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=1 + max(int(n.split(".")[2]) for n in text if n.startswith("encoder.layer.")),
        num_attention_heads=med.get("num_attention_heads", 12),
        max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
        layer_norm_eps=med.get("layer_norm_eps", 1e-12),
        hidden_act=med.get("hidden_act", "gelu"),
        is_decoder=True,
        use_cache=False,
        pad_token_id=med.get("pad_token_id", 0),
        bos_token_id=None,
        sep_token_id=None,
        # sdpa is silently wrong for this text model.
        attn_implementation="eager",
    )
    return BlipVisionModel(vision_config).eval(), BlipTextModel(text_config, add_pooling_layer=False).eval()


def _below(state: State, prefix: str) -> State:
    return {name[len(prefix) :]: tensor.float() for name, tensor in state.items() if name.startswith(prefix)}
