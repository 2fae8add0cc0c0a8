"""The frozen reference diffusion: guided predictions with both branches batched in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_t2i.algorithm.losses import guidance_omega, guided
from rlhf_t2i.families.networks import predict
from rlhf_t2i.roles.context import RankContext
from rlhf_t2i.roles.denoiser import Branch, DenoiserServer


class ReferenceRole(DenoiserServer):
    """Serves the reference's x0-predictions, plain or with classifier-free guidance (algorithm.md 1.5)."""

    def __init__(self, context: RankContext) -> None:
        super().__init__(self._branches, context.callers)
        store = context.store
        self._unet, self._schedule, self._conditioner = store.reference_unet(), store.schedule, store.conditioner
        if context.recipe.optimization.checkpoints("reference"):
            # diffusers checkpoints only networks in training mode; a diffusion UNet has no dropout to wake.
            self._unet.enable_gradient_checkpointing()
            self._unet.train()
        self._dtype = context.dtype
        cfg = context.recipe.algorithm.cfg
        self._omega = guidance_omega(cfg.guidance_scale, cfg.convention) if cfg.mode == "inner" else 1.0

    def _branches(self, x_t: Tensor, t: Tensor, prompts: Sequence[str], branch: Branch) -> Tensor:
        if branch == "conditional" or (branch == "guided" and self._omega == 1.0):
            return self._x0(x_t, t, prompts)
        if branch == "both" and x_t.requires_grad:
            with torch.no_grad():
                unconditional = self._x0(x_t, t, None)
            return torch.stack([self._x0(x_t, t, prompts), unconditional], dim=1)
        condition = self._conditioner.unconditional(len(x_t)).concatenate(self._conditioner.encode(prompts))
        twice, t_twice = torch.cat([x_t, x_t]), torch.cat([t, t])
        raw = predict(self._unet, twice, t_twice, condition, self._dtype)
        unconditional, conditional = self._schedule.to_x0(raw, twice, t_twice).chunk(2)
        if branch == "both":
            return torch.stack([conditional, unconditional], dim=1)
        return guided(conditional, unconditional, self._omega)

    def _x0(self, x_t: Tensor, t: Tensor, prompts: Sequence[str] | None) -> Tensor:
        encode = self._conditioner
        condition = encode.unconditional(len(x_t)) if prompts is None else encode.encode(prompts)
        return self._schedule.to_x0(predict(self._unet, x_t, t, condition, self._dtype), x_t, t)
