"""A scorer behind a URL: PNG images in JSON, a list of numbers back. For evaluation only, since it has no gradient.

Request, ``POST url``: ``{"prompts": [...], "images": ["<base64 PNG>", ...]}``. Answer: ``{"scores": [...]}``, one
number a prompt. Nothing is unpickled and nothing is compressed with loss.
"""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rlhf_t2i import plugin
from rlhf_t2i.errors import RunError

Seconds = Annotated[float, Field(gt=0, le=3600)]


class HTTPOptions(plugin.Options):
    """Where the scorer answers and how patient to be."""

    url: str = Field(description="http:// or https:// address that takes the POST")
    timeout_s: Seconds = Field(60.0, description="seconds for one attempt")
    retries: int = Field(3, ge=0, le=100, description="more attempts after a time-out, a lost connection or a 5xx")
    backoff_s: float = Field(1.0, ge=0, le=600, description="pause before the first retry; doubled each time")
    token_env: str | None = Field(None, description="environment variable with a bearer token")
    unit: str = Field("", description="the unit of the score, for tables")

    @field_validator("url")
    @classmethod
    def _web_address(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return value


class HTTPReward(plugin.Reward):
    """Whatever the server measures. Images are rounded to 8 bits, as PNG needs."""

    Options = HTTPOptions
    options: HTTPOptions
    differentiable = False
    license = "the server's"

    def __init__(self, options: HTTPOptions) -> None:
        super().__init__(options)
        self.unit = options.unit
        if options.token_env is not None and not os.environ.get(options.token_env):
            from rlhf_t2i.errors import UsageError

            raise UsageError(f"reward 'http': the environment variable {options.token_env} is not set")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The server's scores [B] for images [B, 3, H, W] in [0, 1].

        Raises:
            RunError: No answer after all attempts, an error status, or an answer of the wrong form.
        """
        body = {"prompts": list(prompts), "images": [_png(image) for image in images.detach()]}
        answer = self._post(body)
        scores = answer.get("scores") if isinstance(answer, dict) else None
        numbers = isinstance(scores, list) and all(isinstance(s, (int, float)) for s in scores)
        if not numbers or len(scores) != len(prompts):  # type: ignore[arg-type]
            raise RunError(f'{self.options.url} did not answer {{"scores": [{len(prompts)} numbers]}}')
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _post(self, body: dict[str, Any]) -> Any:
        import httpx

        headers = {}
        if self.options.token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.options.token_env]}"
        reason = ""
        for attempt in range(self.options.retries + 1):
            if attempt:
                time.sleep(self.options.backoff_s * 2 ** (attempt - 1))
            try:
                response = httpx.post(self.options.url, json=body, headers=headers, timeout=self.options.timeout_s)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__} {error}".strip()
                continue
            if response.status_code >= 500 or response.status_code == 429:
                reason = f"status {response.status_code}"
                continue
            if response.status_code != 200:
                # A mistake in the request stays one: no retry.
                raise RunError(f"{self.options.url} answered {response.status_code}: {response.text[:200]}")
            try:
                return response.json()
            except ValueError:
                raise RunError(f"{self.options.url} did not answer with JSON") from None
        raise RunError(f"{self.options.url} gave no answer in {self.options.retries + 1} attempts: {reason}")


def _png(image: Tensor) -> str:
    from PIL import Image

    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
