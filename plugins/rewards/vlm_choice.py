"""The probability of an answer of a vision-language model to a question about the image.

With the question "Does this figure show ...?" and no alternatives this is VQAScore (Lin et al. 2024, arXiv:2404.01291),
``P("Yes" | image, question)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from rlhf_t2i_plugins.rewards.clip_model import find_config, load_tokenizer, load_weights
from rlhf_t2i_plugins.rewards.qwen_images import QwenPreprocess
from rlhf_t2i_plugins.rewards.qwen_vl import (
    AFTER_IMAGE,
    ANSWER,
    BEFORE_IMAGE,
    Precision,
    QwenText,
    QwenVL,
    adapted,
)
from torch import Tensor, nn
from torch.nn import functional

from rlhf_t2i import plugins
from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.families import sources
from rlhf_t2i.plugins.precision import at_least_float32, without_autocast

_CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
_TEXT = (15, 18 + 32)
"""Tokens before and after the image, for planning: counted with Qwen's vocabulary; 32 for the prompt."""


class VLMChoiceOptions(plugins.Options):
    """The model, the question, and its answers."""

    model: str = Field("Qwen/Qwen2-VL-7B-Instruct", description=f"hub id or folder: {' or '.join(_CLASSES)}")
    question: str = Field(
        'Does this figure show "{prompt}"? Please answer yes or no.', description="{prompt} stands for the prompt"
    )
    answer: str = Field("Yes", description="its probability is the score; one token of the model")
    alternatives: tuple[str, ...] = Field(
        ("No",), description="the probability is among these and the answer; among all tokens if empty (VQAScore)"
    )
    unit: Literal["probability", "logit"] = Field("probability", description="logit is log(p / (1 - p))")
    max_pixels: int = Field(256 * 28 * 28, ge=28 * 28, description="larger images are shrunk to so many pixels")
    dtype: Precision | None = Field(None, description="of its weights; the run's precision when absent")

    @model_validator(mode="after")
    def _consistent(self) -> VLMChoiceOptions:
        if self.question.count("{prompt}") != 1:
            raise ValueError("question must hold {prompt} once")
        choices = (self.answer, *self.alternatives)
        if not all(choices) or len(set(choices)) < len(choices):
            raise ValueError("answer and alternatives must differ, and none may be empty")
        return self


class VLMChoice(plugins.Reward):
    """Probability of an answer to a question: ``p = sigmoid(l_answer - logsumexp(l_others))`` of next-token logits l.

    The others are the alternatives or, without any, all other tokens. License of the default model: Apache-2.0.
    """

    Options = VLMChoiceOptions
    options: VLMChoiceOptions
    unit = "probability"
    value_range = (0.0, 1.0)
    license = "Apache-2.0"

    def __init__(self, options: VLMChoiceOptions | None = None) -> None:
        super().__init__(options)
        source = sources.parse(self.options.model)
        whole = plugins.shared(_load, source, self.options.dtype)
        preprocess = _preprocess(source, self.options.max_pixels)
        self.vlm = QwenVL(whole.model, preprocess, self.options.dtype, lm_head=whole.lm_head)
        self.text = QwenText(load_tokenizer(source, whole.config.text_config.vocab_size))
        self._answer, *self._others = (self._token(word) for word in (self.options.answer, *self.options.alternatives))
        if self._answer in self._others:
            raise UsageError(f"answer {self.options.answer!r} and an alternative are the same token")
        if self.options.unit == "logit":
            self.value_range = (float("-inf"), float("inf"))

    def _token(self, word: str) -> int:
        ids = self.text.ids(word)
        if len(ids) != 1:
            raise UsageError(f"answer {word!r} is {len(ids)} tokens of {self.options.model}: choose a word that is one")
        return ids[0]

    @classmethod
    def preflight(cls, options: VLMChoiceOptions) -> None:
        """Refuse a local folder of another model."""
        source = sources.parse(options.model)
        if source.is_local:
            cls.footprint(options)
            _preprocess(source, options.max_pixels)

    @classmethod
    def hub_models(cls, options: VLMChoiceOptions) -> list[str]:
        """See :meth:`rlhf_t2i.plugins.Reward.hub_models`."""
        return [options.model]

    @classmethod
    def footprint(cls, options: VLMChoiceOptions) -> plugins.Footprint | None:
        """See :meth:`rlhf_t2i.plugins.Reward.footprint`."""
        source = sources.parse(options.model)
        config = find_config(source)
        if config is None:
            return None
        _class(config, source)
        return plugins.Footprint(
            f"{source.location}@{source.revision} {options.dtype}", lambda: _Layers(config, source, options)
        )

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Probability, or logit, of the answer for images [B, 3, H, W] in [0, 1] and their prompts [B]."""
        self.text.check(prompts)
        questions = [self.options.question.replace("{prompt}", prompt) for prompt in prompts]
        after = [self.text.ids(AFTER_IMAGE + question + ANSWER) for question in questions]
        states = self.vlm(images, self.text.ids(BEFORE_IMAGE), after)
        logit = self._logits(states, [self._answer])[:, 0] - self._logits(states, self._others).logsumexp(1)
        return logit if self.options.unit == "logit" else logit.sigmoid()

    def _logits(self, states: Tensor, tokens: list[int]) -> Tensor:
        """Logits [B, len(tokens)] in float32 or better; of all tokens but the answer if there are none."""
        weight: Any = self.vlm.lm_head.weight
        with without_autocast(states):
            if tokens:
                rows = weight[torch.tensor(tokens, device=weight.device)]
                return functional.linear(at_least_float32(states), at_least_float32(rows))
            logits = at_least_float32(functional.linear(states, weight))
            answer = torch.zeros_like(logits, dtype=torch.bool)
            answer[:, self._answer] = True
            return logits.masked_fill(answer, float("-inf"))


def _class(config: dict[str, Any], source: sources.ModelRef) -> Any:
    import transformers

    kind = config.get("model_type")
    if kind not in _CLASSES:
        raise UsageError(f"{source.location} is a {kind!r} model; vlm_choice asks {' and '.join(_CLASSES)}")
    return getattr(transformers, _CLASSES[kind])


def _load(source: sources.ModelRef, dtype: Precision | None) -> Any:
    cls = _class(sources.read_json(source, "config.json"), source)
    whole = load_weights(cls, source, dtype or "auto").eval().requires_grad_(False)
    adapted(whole.model)
    return whole


def _preprocess(source: sources.ModelRef, max_pixels: int) -> QwenPreprocess:
    """The model's preprocessing, with at most so many pixels.

    Raises:
        UsageError: No image processor there, or one that does what this project does not.
    """
    file = "preprocessor_config.json"
    config = sources.find_json(source, file) or sources.read_json(source, file := "processor_config.json")
    try:
        found = QwenPreprocess.from_config(config)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{source.location}/{file}: {first_line(error)}") from error
    if max_pixels < found.min_pixels:
        raise UsageError(f"max_pixels {max_pixels} is under {source.location}'s min_pixels {found.min_pixels}")
    return found.limited(max_pixels)


class _Layers(nn.Module):
    """The model without weights, for its footprint."""

    def __init__(self, config: dict[str, Any], source: sources.ModelRef, options: VLMChoiceOptions) -> None:
        super().__init__()
        cls = _class(config, source)
        whole = cls(cls.config_class(**config))
        vision = whole.config.vision_config
        preprocess = QwenPreprocess(
            max_pixels=options.max_pixels,
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            frames=vision.temporal_patch_size,
        )
        self.vlm: Any = QwenVL(adapted(whole.model), preprocess, options.dtype, lm_head=whole.lm_head)

    def forward(self, images: Tensor) -> Tensor:
        """A number for each of the images [B, 3, H, W] in [0, 1]."""
        before, after = ([0] * count for count in _TEXT)
        return self.vlm.lm_head(self.vlm(images, before, [after] * len(images)))[:, 0]
