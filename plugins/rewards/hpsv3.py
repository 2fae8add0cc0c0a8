"""HPSv3 (Ma et al. 2025, arXiv:2508.03789) on transformers' own Qwen2-VL: a 7B model with a head for preference.

The package hpsv3 needs transformers 4.45. Its published checkpoint fits the current Qwen2-VL weight for weight, and
gives the same scores and gradients (tests/rewards/fixtures/README.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rlhf_t2i_plugins.rewards.checkpoints import State, find_file, load_exactly, read_state
from rlhf_t2i_plugins.rewards.clip_model import find_config, load_tokenizer
from rlhf_t2i_plugins.rewards.hpsv3_prompt import REWARD_TOKEN, question
from rlhf_t2i_plugins.rewards.qwen_images import QwenPreprocess
from rlhf_t2i_plugins.rewards.qwen_vl import (
    AFTER_IMAGE,
    BEFORE_IMAGE,
    Precision,
    QwenText,
    QwenVL,
    adapted,
)
from torch import Tensor, nn

from rlhf_t2i import plugins
from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.families import sources
from rlhf_t2i.plugins.precision import Float32

_FILE = "HPSv3.safetensors"
_PIXELS = 256 * 28 * 28
_TOKENS = 151_658  # Qwen2-VL's 151,657 and the reward token
_TEXT = (15, 507 + 32)
"""Tokens before and after the image, for planning: counted with Qwen's vocabulary; 32 for the prompt."""


class HPSv3Options(plugins.Options):
    """Where the checkpoint and its base model are."""

    model: str = Field("MizzenAI/HPSv3", description=f"hub id, folder or file of the checkpoint, {_FILE}")
    base: str = Field("Qwen/Qwen2-VL-7B-Instruct", description="hub id or folder with config.json and the tokenizer")
    dtype: Precision | None = Field(None, description="of its weights; the run's precision when absent")


class HPSv3(plugins.Reward):
    """People's preference, the mean mu of the model's Gaussian; generators average 0 to 12 in the authors' table.

    Every image is resized to about 448 x 448 pixels (256 tokens of Qwen2-VL), its sides multiples of 28. Prompts are
    not cut. License of the weights: MIT; of the base model: Apache-2.0.
    """

    Options = HPSv3Options
    options: HPSv3Options
    unit = "preference"
    license = "MIT"

    def __init__(self, options: HPSv3Options | None = None) -> None:
        super().__init__(options)
        path = find_file(sources.parse(self.options.model), [_FILE])
        base = sources.parse(self.options.base)
        model, self.head = plugins.shared(_load, path, base, self.options.dtype)
        vision = model.config.vision_config
        self.vlm = QwenVL(model, preprocess_of(vision), self.options.dtype, sequential=True)
        known = model.config.text_config.vocab_size
        tokenizer = load_tokenizer(base, known)
        tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        if len(tokenizer) != known:
            raise UsageError(
                f"the tokenizer of {base.location} has {len(tokenizer)} tokens with {REWARD_TOKEN}; "
                f"{path} knows {known}"
            )
        self.text = QwenText(tokenizer)

    @classmethod
    def preflight(cls, options: HPSv3Options) -> None:
        """Refuse a local folder that lacks its files."""
        source, base = sources.parse(options.model), sources.parse(options.base)
        if source.is_local:
            find_file(source, [_FILE])
        if base.is_local:
            sources.read_json(base, "config.json")

    @classmethod
    def hub_models(cls, options: HPSv3Options) -> list[str]:
        """See :meth:`rlhf_t2i.plugins.Reward.hub_models`."""
        return [options.model, options.base]

    @classmethod
    def footprint(cls, options: HPSv3Options) -> plugins.Footprint | None:
        """See :meth:`rlhf_t2i.plugins.Reward.footprint`."""
        config = find_config(sources.parse(options.base))
        if config is None:
            return None
        return plugins.Footprint(f"{options.model} {options.dtype}", lambda: _Layers(config, options.dtype))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Mean preference of images [B, 3, H, W] in [0, 1] for their prompts [B]."""
        self.text.check(prompts)
        after = [self.text.ids(AFTER_IMAGE + question(prompt)) for prompt in prompts]
        return self.head(self.vlm(images, self.text.ids(BEFORE_IMAGE), after))[:, 0]


class PreferenceHead(Float32):
    """States [B, D] to mean and log deviation [B, 2] in float32; weights are named ``rm_head.{0,3,5}`` as published."""

    def __init__(self, features: int) -> None:
        super().__init__()
        # The dropout does nothing in eval mode; it keeps the published numbering.
        self.rm_head = nn.Sequential(
            nn.Linear(features, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )

    def forward(self, states: Tensor) -> Tensor:
        """Mean of the preference, and the logarithm of its standard deviation [B, 2]."""
        return self.rm_head(states)


class VisionRope(Float32):
    """The vision tower's cosines and sines as the original computes them: in bf16, whatever the activations are.

    It casts the model with its frequencies to bf16 before training, so the weights are fitted to these positions.
    """

    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [P, head] of rows and columns [P, 2], on the device of the states."""
        angles = position_ids.to(states.device, torch.bfloat16)[..., None] * self.rope.inv_freq.bfloat16()
        cosines, sines = (self.rope.recomposition_frequencies(part.float()) for part in (angles.cos(), angles.sin()))
        return cosines, sines


def preprocess_of(vision: Any) -> QwenPreprocess:
    """The published preprocessing, for a vision tower's configuration."""
    return QwenPreprocess(_PIXELS, _PIXELS, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)


def _load(path: Path, base: sources.ModelRef, dtype: Precision | None) -> tuple[Any, PreferenceHead]:
    """The model without the language model's head, and the preference head."""
    state = read_state(path)
    embedding = state.get("model.embed_tokens.weight")
    if embedding is None or embedding.ndim != 2:
        raise UsageError(f"{path} is not an HPSv3 checkpoint: it has no model.embed_tokens.weight")
    model = empty_model(sources.read_json(base, "config.json"), len(embedding), base.location)
    weights, head = rename_weights(state)
    unused = head.pop("lm_head.weight", None)
    if unused is None or unused.shape != embedding.shape:
        raise UsageError(f"{path} is not an HPSv3 checkpoint: its lm_head.weight is not {list(embedding.shape)}")
    load_exactly(model, weights, path, assign=True)
    scorer = PreferenceHead(model.config.text_config.hidden_size)
    load_exactly(scorer, head, path)
    _restore_frequencies(model)
    return adapted(model, VisionRope), scorer


def rename_weights(state: State) -> tuple[State, State]:
    """A checkpoint's weights under Qwen2VLModel's names, and all that does not belong to it under their own."""
    weights: State = {}
    rest: State = {}
    for name, tensor in state.items():
        if name.startswith("visual."):
            weights[name] = tensor
        elif name.startswith("model."):
            weights["language_model." + name.removeprefix("model.")] = tensor
        else:
            rest[name] = tensor
    return weights, rest


def empty_model(config: dict[str, Any], tokens: int, where: str) -> Any:
    """A Qwen2VLModel on the meta device.

    Raises:
        UsageError: The configuration is not Qwen2-VL's.
    """
    from transformers import Qwen2VLConfig, Qwen2VLModel

    if config.get("model_type") != "qwen2_vl":
        raise UsageError(f"{where}/config.json is not Qwen2-VL's: its model_type is {config.get('model_type')!r}")
    try:
        found = Qwen2VLConfig(**config)
        found.text_config.vocab_size = tokens
        with torch.device("meta"):
            return Qwen2VLModel(found).eval()
    except Exception as error:
        raise UsageError(f"{where}/config.json cannot be read as Qwen2-VL's: {first_line(error)}") from error


def _restore_frequencies(model: Any) -> None:
    """Real frequencies in place of those on the meta device, rounded to bf16 as the original's: see VisionRope."""
    text, vision = model.language_model, model.visual
    rope = type(text.rotary_emb)(text.config)
    rope.inv_freq = rope.inv_freq.bfloat16().float()
    text.rotary_emb, vision.rotary_pos_emb = rope, type(vision.rotary_pos_emb)(vision.config)


class _Layers(nn.Module):
    """HPSv3 without weights, for its footprint."""

    def __init__(self, config: dict[str, Any], dtype: Precision | None) -> None:
        super().__init__()
        model = adapted(empty_model(config, _TOKENS, "the base model"), VisionRope)
        self.vlm = QwenVL(model, preprocess_of(model.config.vision_config), dtype, sequential=True)
        self.head = PreferenceHead(model.config.text_config.hidden_size)

    def forward(self, images: Tensor) -> Tensor:
        """A number for each of the images [B, 3, H, W] in [0, 1]."""
        before, after = ([0] * count for count in _TEXT)
        return self.head(self.vlm(images, before, [after] * len(images)))[:, 0]
