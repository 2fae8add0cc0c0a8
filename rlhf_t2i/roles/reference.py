"""The frozen reference diffusion: guided predictions with both branches batched in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_t2i.algorithm.losses import guidance_omega, guided
from rlhf_t2i.families.base import Conditioning
from rlhf_t2i.roles.context import RankContext
from rlhf_t2i.roles.denoiser import Branch, DenoiserServer


class ReferenceRole(DenoiserServer):
    """Serves the reference's x0-predictions, plain or with classifier-free guidance (algorithm.md 1.5)."""

    def __init__(self, context: RankContext) -> None:
        super().__init__(self._branches, context.callers)
        self._store = context.store
        self._network = self._store.reference_network()
        if context.recipe.optimization.checkpoints("reference"):
            self._store.family.enable_checkpointing(self._network)
        cfg = context.recipe.algorithm.cfg
        self._omega = guidance_omega(cfg.guidance_scale, cfg.convention) if cfg.mode == "inner" else 1.0

    def _branches(self, x_t: Tensor, t: Tensor, prompts: Sequence[str], branch: Branch) -> Tensor:
        if branch == "conditional" or (branch == "guided" and self._omega == 1.0):
            return self._x0(x_t, t, prompts)
        if branch == "both" and x_t.requires_grad:
            with torch.no_grad():
                unconditional = self._x0(x_t, t, None)
            return torch.stack([self._x0(x_t, t, prompts), unconditional], dim=1)
        encoder = self._store.conditioner
        condition = Conditioning.cat([encoder.unconditional(len(x_t)), encoder.encode(prompts)])
        twice, t_twice = torch.cat([x_t, x_t]), torch.cat([t, t])
        unconditional, conditional = self._store.denoise(self._network, twice, t_twice, condition).chunk(2)
        if branch == "both":
            return torch.stack([conditional, unconditional], dim=1)
        return guided(conditional, unconditional, self._omega)

    def _x0(self, x_t: Tensor, t: Tensor, prompts: Sequence[str] | None) -> Tensor:
        encoder = self._store.conditioner
        condition = encoder.unconditional(len(x_t)) if prompts is None else encoder.encode(prompts)
        return self._store.denoise(self._network, x_t, t, condition)
