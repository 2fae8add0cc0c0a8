"""The implicit reward behind classifier-free guidance (Diff-Instruct*, equations 3.6 and 3.7).

Its gradient comes from the reference denoiser: towards what the reference draws with the prompt, away from what it
draws without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rlhf_t2i import plugins


class CFGImplicitOptions(plugins.Options):
    """The weighting w(t) of (3.6)."""

    weighting: Literal["unit_x0", "score", "eps"] = Field("unit_x0", description="as in algorithm.weighting")


class CFGImplicit(plugins.LatentReward):
    """``w/2 (|D(x_t|0) - x_0|^2 - |D(x_t|c) - x_0|^2)``: how much better the reference denoises with the prompt.

    With both predictions held fixed its gradient is ``w (D(x_t|c) - D(x_t|0))``, that of (3.6) exactly; the value is
    the denoising estimate of ``log p_ref(x|c) - log p_ref(x)`` (3.7) at one random t, in nats for the ``score``
    weighting and in squared latent units for ``unit_x0``.
    """

    Options = CFGImplicitOptions
    options: CFGImplicitOptions
    unit = "x0 units^2"
    license = "the reference's"

    @classmethod
    def unit_of(cls, options: CFGImplicitOptions) -> str:
        """The unit follows the weighting."""
        return {"unit_x0": cls.unit, "score": "nats", "eps": "nats x g"}[options.weighting]

    def score_latents(self, latents: Tensor, prompts: Sequence[str], context: plugins.LatentContext) -> Tensor:
        """The implicit reward [B] of latents [B, C, h, w] at one timestep each."""
        t = context.sample_timesteps(len(latents))
        with torch.no_grad():
            # (3.6) stops the gradient at the network's input: the force is a field at x_t, not a function of theta.
            x_t = context.add_noise(latents, context.sample_noise(latents), t)
            conditional, unconditional = context.reference(x_t, t, prompts)
            alpha, sigma = context.coefficients(t, latents)
        if self.options.weighting == "score":
            weight = alpha**2 / sigma**2
        elif self.options.weighting == "eps":
            weight = alpha**2 / sigma
        else:
            weight = torch.ones_like(alpha)
        difference = (unconditional - latents).square() - (conditional - latents).square()
        return 0.5 * (weight * difference).flatten(1).sum(1)
