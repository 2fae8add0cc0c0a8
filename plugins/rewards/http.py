"""A scorer behind a URL: PNG images in JSON, a list of numbers back. It has no gradient; ``surrogate`` learns it.

Request, ``POST url``: ``{"prompts": [...], "images": ["<base64 PNG>", ...]}``. Answer: ``{"scores": [...]}``, one
number per prompt. Nothing is unpickled and nothing is compressed with loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from rlhf_t2i_plugins.rewards.endpoint import Elsewhere, Endpoint, EndpointOptions, base64_png
from torch import Tensor

from rlhf_t2i import plugins
from rlhf_t2i.errors import RunError

_BASE_BYTES, _BYTES_A_SCORE = 4096, 64  # an answer of B scores may have this much more than B times that


class HTTPOptions(EndpointOptions):
    """Address of the scorer, timeouts and retries."""

    unit: str = Field("", description="the unit of the score, for tables")


class HTTPReward(plugins.Reward):
    """Score computed by a server. Images are rounded to 8 bits for PNG."""

    Options = HTTPOptions
    options: HTTPOptions
    differentiable = False
    license = "the server's"

    @classmethod
    def preflight(cls, options: HTTPOptions) -> None:
        """Refuse hosts and tokens without consent."""
        options.check_consent("reward 'http'")

    @classmethod
    def footprint(cls, options: HTTPOptions) -> plugins.Footprint | None:
        """See :meth:`rlhf_t2i.plugins.Reward.footprint`."""
        return plugins.Footprint(options.url, Elsewhere)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The server's scores [B] for images [B, 3, H, W] in [0, 1].

        Raises:
            RunError: No answer after all attempts, an error status, or an answer of the wrong form.
        """
        url, limit = self.options.url, _BASE_BYTES + _BYTES_A_SCORE * len(prompts)
        body = {"prompts": list(prompts), "images": [base64_png(image) for image in images]}
        (answer,) = Endpoint(self.options).post([body], limit)
        scores: Any = answer.get("scores") if isinstance(answer, dict) else None
        wrong = not isinstance(scores, list) or len(scores) != len(prompts)
        if wrong or not all(isinstance(s, (int, float)) for s in scores):
            raise RunError(f'{url} did not answer {{"scores": [{len(prompts)} numbers]}}')
        try:
            return torch.tensor([float(s) for s in scores], dtype=torch.float32, device=images.device)
        except OverflowError:
            raise RunError(f"{url} answered with a number too large") from None
