"""A vision-language model behind an OpenAI-compatible endpoint, asked with a rubric for a number. It has no gradient.

Request, ``POST url`` (``https://HOST/v1/chat/completions``): one image per request. The answer's message must be the
JSON object ``{"score": NUMBER}`` within the rubric's range; one that is not is asked for again, then refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from rlhf_t2i_plugins.rewards.endpoint import Elsewhere, Endpoint, EndpointOptions, base64_png
from torch import Tensor

from rlhf_t2i import plugins
from rlhf_t2i.errors import RunError

_LIMIT = 65_536
_RUBRIC = (
    "You grade images made from a text prompt. Grade how well the image shows what the prompt asks for, and how well "
    "it is drawn: {low} is useless, {high} is flawless. Answer with the JSON object "
    '{{"score": NUMBER}} alone.'
)


class VLMJudgeOptions(EndpointOptions):
    """The endpoint, the model and the rubric."""

    model: str = Field(min_length=1, description="the model's name at the endpoint")
    rubric: str | None = Field(
        None, description="system message; it must ask for the JSON object {score: NUMBER}; a general one when absent"
    )
    question: str = Field("The prompt: {prompt}", description="user message beside the image; {prompt} once")
    low: float = Field(0.0, allow_inf_nan=False, description="the rubric's lowest score")
    high: float = Field(10.0, allow_inf_nan=False, description="the rubric's highest score")
    attempts: int = Field(3, ge=1, le=20, description="requests until an answer has the right form")
    concurrency: int = Field(8, ge=1, le=256, description="requests at once")
    max_tokens: int = Field(256, ge=8, le=65_536, description="tokens that an answer may have")
    seed: int = Field(0, ge=0, description="sent with every request, for servers that heed it; the temperature is 0")

    @field_validator("question")
    @classmethod
    def _one_prompt(cls, value: str) -> str:
        if value.count("{prompt}") != 1:
            raise ValueError("must hold {prompt} once")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> VLMJudgeOptions:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be less than high {self.high:g}")
        return self


class VLMJudge(plugins.Reward):
    """A model's score between ``low`` and ``high`` for each image."""

    Options = VLMJudgeOptions
    options: VLMJudgeOptions
    differentiable = False
    unit = "rubric"
    license = "the server's"

    def __init__(self, options: VLMJudgeOptions | None = None) -> None:
        super().__init__(options)
        self.value_range = (self.options.low, self.options.high)

    @classmethod
    def preflight(cls, options: VLMJudgeOptions) -> None:
        """Refuse hosts and tokens without consent."""
        options.check_consent("reward 'vlm_judge'")

    @classmethod
    def hub_models(cls, options: VLMJudgeOptions) -> list[str]:
        """None: the model is the server's."""
        return []

    @classmethod
    def footprint(cls, options: VLMJudgeOptions) -> plugins.Footprint | None:
        """See :meth:`rlhf_t2i.plugins.Reward.footprint`."""
        return plugins.Footprint(options.url, Elsewhere)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1].

        Raises:
            RunError: No answer, or none of the right form after all attempts.
        """
        endpoint, scores = Endpoint(self.options), dict[int, float]()
        last: Any = None
        for attempt in range(self.options.attempts):
            missing = [index for index in range(len(prompts)) if index not in scores]
            bodies = [self._body(images[i], prompts[i], self.options.seed + attempt) for i in missing]
            for index, answer in zip(missing, endpoint.post(bodies, _LIMIT, self.options.concurrency), strict=True):
                found = self._read(answer)
                if found is None:
                    last = answer
                else:
                    scores[index] = found
            if len(scores) == len(prompts):
                return torch.tensor([scores[i] for i in range(len(prompts))], device=images.device)
        raise RunError(
            f'{self.options.url} did not answer with {{"score": {self.options.low:g} to {self.options.high:g}}} in '
            f"{self.options.attempts} attempts: {str(_message(last))[:200]!r}"
        )

    def _body(self, image: Tensor, prompt: str, seed: int) -> dict[str, Any]:
        low, high = self.options.low, self.options.high
        rubric = self.options.rubric or _RUBRIC.format(low=f"{low:g}", high=f"{high:g}")
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_png(image)}"}}
        text = {"type": "text", "text": self.options.question.replace("{prompt}", prompt)}
        return {
            "model": self.options.model, "temperature": 0, "seed": seed, "max_tokens": self.options.max_tokens,
            "response_format": {"type": "json_object"},
            "messages": [{"role": "system", "content": rubric}, {"role": "user", "content": [text, picture]}],
        }  # fmt: skip

    def _read(self, answer: object) -> float | None:
        """The score in an answer; None where it has another form or is outside the range."""
        try:
            content = json.loads(_message(answer) or "")
        except (ValueError, TypeError, RecursionError):
            return None
        score = content.get("score") if isinstance(content, dict) else None
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            return None
        return float(score) if self.options.low <= score <= self.options.high else None


def _message(answer: Any) -> Any:
    """The text of a chat completion; None where there is none."""
    try:
        return answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
