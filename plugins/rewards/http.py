"""A scorer behind a URL: PNG images in JSON, a list of numbers back. For evaluation only: it has no gradient.

Request, ``POST url``: ``{"prompts": [...], "images": ["<base64 PNG>", ...]}``. Answer: ``{"scores": [...]}``, one
number per prompt. Nothing is unpickled and nothing is compressed with loss. No redirect is followed and no proxy is
used, so that images and token go to the named host alone; host and token need consent by name (docs/security.md). An
answer longer than its numbers can be is refused.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any
from urllib.parse import urlsplit

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from rlhf_t2i import plugins
from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.plugins import consent
from rlhf_t2i.utils.images import png

_BASE_BYTES, _BYTES_A_SCORE = 4096, 64  # an answer of B scores may have this much more than B times that

Seconds = Annotated[float, Field(gt=0, le=3600)]


class HTTPOptions(plugins.Options):
    """Address of the scorer, timeouts and retries."""

    url: str = Field(description="http:// or https:// address of the POST request")
    timeout_s: Seconds = Field(60.0, description="seconds for one attempt, from the connection to the last byte")
    retries: int = Field(
        3, ge=0, le=100, description="attempts after the first, on a timeout, a lost connection, 429 or 5xx"
    )
    backoff_s: float = Field(
        1.0, ge=0, le=600, description="seconds before the first retry; doubled for each further one"
    )
    token_env: str | None = Field(None, description="environment variable that holds a bearer token")
    unit: str = Field("", description="the unit of the score, for tables")

    @field_validator("url")
    @classmethod
    def _web_address(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        if any(not c.isprintable() or c.isspace() for c in value):
            raise ValueError("must hold no spaces and no control characters")
        parts = urlsplit(value)
        if not parts.hostname or parts.port == 0:  # port raises, too
            raise ValueError("must name a host")
        return value


class _Elsewhere(nn.Module):
    """The model runs on the server."""

    def forward(self, images: Tensor) -> Tensor:
        """Nothing is computed here."""
        return images.mean((1, 2, 3))


class HTTPReward(plugins.Reward):
    """Score computed by a server. Images are rounded to 8 bits for PNG."""

    Options = HTTPOptions
    options: HTTPOptions
    differentiable = False
    license = "the server's"

    @classmethod
    def preflight(cls, options: HTTPOptions) -> None:
        """Refuse hosts and tokens without consent, and a token that no HTTP header can hold (docs/security.md)."""
        consent.check_host(options.url, "reward 'http'")
        if options.token_env is None:
            return
        consent.check_token(options.token_env, "reward 'http'")
        token = os.environ.get(options.token_env)
        if not token:
            raise UsageError(f"reward 'http': the environment variable {options.token_env} is not set")
        if not (token.isascii() and token.isprintable()):  # a client's error would show it
            raise UsageError(
                f"reward 'http': the environment variable {options.token_env} holds a character that no HTTP "
                "header can hold: a line break at its end?"
            )

    @classmethod
    def footprint(cls, options: HTTPOptions) -> plugins.Footprint | None:
        """See :meth:`rlhf_t2i.plugins.Reward.footprint`."""
        return plugins.Footprint(options.url, _Elsewhere)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The server's scores [B] for images [B, 3, H, W] in [0, 1].

        Raises:
            RunError: No answer after all attempts, an error status, or an answer of the wrong form.
        """
        body = {"prompts": list(prompts), "images": [_base64(png(image)) for image in images]}
        answer = self._post(body, _BASE_BYTES + _BYTES_A_SCORE * len(prompts))
        scores: Any = answer.get("scores") if isinstance(answer, dict) else None
        wrong = not isinstance(scores, list) or len(scores) != len(prompts)
        if wrong or not all(isinstance(s, (int, float)) for s in scores):
            raise RunError(f'{self.options.url} did not answer {{"scores": [{len(prompts)} numbers]}}')
        try:
            return torch.tensor([float(s) for s in scores], dtype=torch.float32, device=images.device)
        except OverflowError:
            raise RunError(f"{self.options.url} answered with a number too large") from None

    def _post(self, body: dict[str, Any], limit: int) -> Any:
        import httpx

        # Uncompressed, so that the limit holds for what is read.
        headers = {"Accept-Encoding": "identity"}
        if self.options.token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.options.token_env]}"
        reason = ""
        for attempt in range(self.options.retries + 1):
            if attempt:
                time.sleep(self.options.backoff_s * 2 ** (attempt - 1))
            try:
                # In a thread of its own, for the caller may have an event loop.
                with ThreadPoolExecutor(1) as pool:
                    status, content = pool.submit(asyncio.run, self._exchange(body, headers, limit)).result()
            except TimeoutError:
                reason = f"not done within {self.options.timeout_s:g} s"
                continue
            except httpx.TransportError as error:
                reason = f"{type(error).__name__} {error}".strip()
                continue
            if status >= 500 or status == 429:
                reason = f"status {status}"
                continue
            if status != 200:
                # The same request would fail again: no retry.
                raise RunError(f"{self.options.url} answered {status}: {_readable(content)}")
            try:
                return json.loads(content)
            except (ValueError, RecursionError):
                raise RunError(f"{self.options.url} did not answer with JSON") from None
        raise RunError(f"{self.options.url} gave no answer in {self.options.retries + 1} attempts: {reason}")

    async def _exchange(self, body: dict[str, Any], headers: dict[str, str], limit: int) -> tuple[int, bytes]:
        """One attempt: the status and the body.

        Asynchronous for its timeout: httpx's own is per read, so that a server that sends a byte now and then could
        hold a run for days. Proxies of the environment are not used: images go to the named host alone.

        Raises:
            RunError: A redirect, or a body over the limit.
            TimeoutError: Not done in time.
        """
        import httpx

        async with (
            asyncio.timeout(self.options.timeout_s),
            httpx.AsyncClient(timeout=None, trust_env=False) as client,
            client.stream("POST", self.options.url, json=body, headers=headers) as response,
        ):
            if response.has_redirect_location:
                raise RunError(
                    f"{self.options.url} redirects to {_readable(response.headers['location'].encode())}, which is not "
                    "followed: name the final address in the recipe"
                )
            content = b""
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > limit and response.status_code != 200:
                    break  # the start of an error's page says enough
                if len(content) > limit:
                    raise RunError(f"{self.options.url} answered with over {limit} bytes")
            return response.status_code, content


def _readable(content: bytes) -> str:
    """The start of a foreign text, on one line and without control characters."""
    return "".join(c if c.isprintable() else " " for c in content.decode("utf-8", "replace")[:200])


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
