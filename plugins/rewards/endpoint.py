"""Posts JSON to a scoring server: retries, one deadline for a whole answer, and consent by name (docs/security.md).

No redirect is followed and no proxy is used, so that images and token go to the named host alone. An answer longer than
it can be is refused.
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

from pydantic import Field, field_validator
from torch import Tensor, nn

from rlhf_t2i import plugins
from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.plugins import consent
from rlhf_t2i.utils.images import png

Seconds = Annotated[float, Field(gt=0, le=3600)]


class EndpointOptions(plugins.Options):
    """Address of a server, timeouts and retries."""

    url: str = Field(description="http:// or https:// address of the POST request")
    timeout_s: Seconds = Field(60.0, description="seconds for one attempt, from the connection to the last byte")
    retries: int = Field(
        3, ge=0, le=100, description="attempts after the first, on a timeout, a lost connection, 429 or 5xx"
    )
    backoff_s: float = Field(
        1.0, ge=0, le=600, description="seconds before the first retry; doubled for each further one"
    )
    token_env: str | None = Field(None, description="environment variable that holds a bearer token")

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

    def check_consent(self, who: str) -> None:
        """Refuse hosts and tokens without consent, and a token that no HTTP header can hold.

        Args:
            who: Begins the error message: ``reward 'http'``.

        Raises:
            UsageError: One sentence.
        """
        consent.check_host(self.url, who)
        if self.token_env is None:
            return
        consent.check_token(self.token_env, who)
        token = os.environ.get(self.token_env)
        if not token:
            raise UsageError(f"{who}: the environment variable {self.token_env} is not set")
        if not (token.isascii() and token.isprintable()):  # a client's error would show it
            raise UsageError(
                f"{who}: the environment variable {self.token_env} holds a character that no HTTP "
                "header can hold: a line break at its end?"
            )


class Elsewhere(nn.Module):
    """The network of a scorer that runs on a server, for ``plan``."""

    def forward(self, images: Tensor) -> Tensor:
        """Nothing is computed here."""
        return images.mean((1, 2, 3))


class Endpoint:
    """A server that answers JSON with JSON.

    Args:
        options: Its address, timeouts and retries.
    """

    def __init__(self, options: EndpointOptions) -> None:
        self._options = options

    def post(self, bodies: Sequence[dict[str, Any]], limit: int, concurrency: int = 1) -> list[Any]:
        """The server's answers to requests, in order.

        Args:
            bodies: One per request.
            limit: Bytes that an answer may have.
            concurrency: Requests at once.

        Raises:
            RunError: No answer after all attempts, an error status, or an answer that is no JSON.
        """
        # In threads, for the caller may have an event loop.
        with ThreadPoolExecutor(max(1, min(concurrency, len(bodies)))) as pool:
            return list(pool.map(lambda body: self._post(body, limit), bodies))

    def _post(self, body: dict[str, Any], limit: int) -> Any:
        import httpx

        # Uncompressed, so that the limit holds for what is read.
        headers = {"Accept-Encoding": "identity"}
        if self._options.token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self._options.token_env]}"
        url, reason = self._options.url, ""
        for attempt in range(self._options.retries + 1):
            if attempt:
                time.sleep(self._options.backoff_s * 2 ** (attempt - 1))
            try:
                status, content = asyncio.run(self._exchange(body, headers, limit))
            except TimeoutError:
                reason = f"not done within {self._options.timeout_s:g} s"
                continue
            except httpx.TransportError as error:
                reason = f"{type(error).__name__} {error}".strip()
                continue
            if status >= 500 or status == 429:
                reason = f"status {status}"
                continue
            if status != 200:
                # The same request would fail again: no retry.
                raise RunError(f"{url} answered {status}: {_readable(content)}")
            try:
                return json.loads(content)
            except (ValueError, RecursionError):
                raise RunError(f"{url} did not answer with JSON") from None
        raise RunError(f"{url} gave no answer in {self._options.retries + 1} attempts: {reason}")

    async def _exchange(self, body: dict[str, Any], headers: dict[str, str], limit: int) -> tuple[int, bytes]:
        """One attempt: the status and the body.

        Asynchronous for its timeout: httpx's own is per read, so that a server that sends a byte now and then could
        hold a run for days. Proxies of the environment are not used: images go to the named host alone.

        Raises:
            RunError: A redirect, or a body over the limit.
            TimeoutError: Not done in time.
        """
        import httpx

        url = self._options.url
        async with (
            asyncio.timeout(self._options.timeout_s),
            httpx.AsyncClient(timeout=None, trust_env=False) as client,
            client.stream("POST", url, json=body, headers=headers) as response,
        ):
            if response.has_redirect_location:
                raise RunError(
                    f"{url} redirects to {_readable(response.headers['location'].encode())}, which is not "
                    "followed: name the final address in the recipe"
                )
            content = b""
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > limit and response.status_code != 200:
                    break  # the start of an error's page says enough
                if len(content) > limit:
                    raise RunError(f"{url} answered with over {limit} bytes")
            return response.status_code, content


def base64_png(image: Tensor) -> str:
    """An image [3, H, W] in [0, 1] as a PNG file in base64."""
    return base64.b64encode(png(image)).decode("ascii")


def _readable(content: bytes) -> str:
    """The start of a foreign text, on one line and without control characters."""
    return "".join(c if c.isprintable() else " " for c in content.decode("utf-8", "replace")[:200])
