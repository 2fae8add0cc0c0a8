"""Text conditioning of SDXL and SD1.5: embeddings, pooled projection, time_ids and the unconditional branch.

SDXL (algorithm.md section 5): two encoders, the penultimate hidden states of each concatenated; the pooled projection
of the second; ``time_ids = (H, W, 0, 0, H, W)``; the unconditional branch is all zeros. SD1.5: one encoder, its last
hidden state; the unconditional branch is the encoded empty prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioning:
    """What a UNet is told about a batch: embeddings [B, L, D] and, for SDXL, pooled [B, P] and time_ids [B, 6]."""

    prompt_embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def unet_kwargs(self, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of ``UNet2DConditionModel.forward``."""
        kwargs: dict[str, Any] = {"encoder_hidden_states": self.prompt_embeds.to(dtype)}
        if self.pooled is not None and self.time_ids is not None:
            kwargs["added_cond_kwargs"] = {"text_embeds": self.pooled.to(dtype), "time_ids": self.time_ids.to(dtype)}
        return kwargs

    def concatenate(self, other: Conditioning) -> Conditioning:
        """This batch followed by another."""

        def cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.cat([a, b])

        return Conditioning(
            torch.cat([self.prompt_embeds, other.prompt_embeds]),
            cat(self.pooled, other.pooled),
            cat(self.time_ids, other.time_ids),
        )


class Conditioner(nn.Module):
    """Encode prompts with frozen text encoders; each distinct prompt once.

    Args:
        tokenizers: One for SD1.5, two for SDXL.
        encoders: The text encoders, in the same order.
        resolution: Pixels, for SDXL's time_ids.
        zero_unconditional: Whether the unconditional embeddings are zeros (SDXL) or the encoded "" (SD1.5).
        cache_size: Distinct prompts kept.
    """

    def __init__(
        self,
        tokenizers: Sequence[Any],
        encoders: Sequence[nn.Module],
        resolution: int,
        zero_unconditional: bool,
        cache_size: int = 4096,
    ) -> None:
        super().__init__()
        self._tokenizers = list(tokenizers)
        self.encoders = nn.ModuleList(encoders).eval().requires_grad_(False)
        self.resolution = resolution
        self.zero_unconditional = zero_unconditional
        self._cache_size = cache_size
        self._cache: dict[str, tuple[Tensor, Tensor | None]] = {}

    @property
    def is_sdxl(self) -> bool:
        """Two encoders, a pooled projection and time_ids."""
        return len(self.encoders) == 2

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of B prompts, on the encoders' device, in float32."""
        self._fill_cache(prompts)
        rows = [self._cache[prompt] for prompt in prompts]
        pooled = [row[1] for row in rows if row[1] is not None]
        return self._build(torch.stack([row[0] for row in rows]), torch.stack(pooled) if pooled else None)

    def unconditional(self, batch: int) -> Conditioning:
        """The unconditional branch for B samples."""
        empty = self.encode([""])
        embeds, pooled = empty.prompt_embeds, empty.pooled
        if self.zero_unconditional:
            embeds = torch.zeros_like(embeds)
            pooled = None if pooled is None else torch.zeros_like(pooled)
        return self._build(embeds.expand(batch, -1, -1), None if pooled is None else pooled.expand(batch, -1))

    def _build(self, embeds: Tensor, pooled: Tensor | None) -> Conditioning:
        if not self.is_sdxl:
            return Conditioning(embeds)
        size = float(self.resolution)
        time_ids = torch.tensor([[size, size, 0.0, 0.0, size, size]], device=embeds.device)
        return Conditioning(embeds, pooled, time_ids.expand(len(embeds), -1))

    @torch.no_grad()
    def _fill_cache(self, prompts: Sequence[str]) -> None:
        missing = [p for p in dict.fromkeys(prompts) if p not in self._cache]
        if len(self._cache) + len(missing) > self._cache_size:
            self._cache.clear()
            missing = list(dict.fromkeys(prompts))
        # One at a time: in a batch the last bits of an embedding depend on the batch's size, and so on which prompts
        # happened to be cached; a resumed run would then differ from an uninterrupted one.
        for prompt in missing:
            self._cache[prompt] = self._encode_one(prompt)

    def _encode_one(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        hidden, pooled = [], None
        for tokenizer, encoder in zip(self._tokenizers, self.encoders, strict=True):
            ids = tokenizer(
                prompt,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            output = encoder(ids.to(next(encoder.parameters()).device), output_hidden_states=True)
            hidden.append((output.hidden_states[-2] if self.is_sdxl else output.last_hidden_state).float())
            if self.is_sdxl and hasattr(output, "text_embeds"):
                pooled = output.text_embeds.float()[0]
        return torch.cat(hidden, dim=-1)[0], pooled

    def _apply(self, fn: Any, recurse: bool = True) -> Conditioner:
        self._cache.clear()
        return super()._apply(fn, recurse)
