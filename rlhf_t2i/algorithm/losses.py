"""The losses of Diff-Instruct*, DI++, SIM and Diff-Instruct as pure functions (algorithm.md, sections 1 and 3).

Everything is written in x0-predictions ``D``; the score is ``s = (a D - x_t) / g^2``. All losses are per sample [B],
summed over the sample's elements; the caller averages over the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rlhf_t2i.algorithm.schedules import Schedule
from rlhf_t2i.plugins import registry
from rlhf_t2i.plugins.base import Divergence

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``(x_t, t) -> x0-prediction``; gradients flow from the prediction back to x_t."""

Weighting = Literal["unit_x0", "inv_mean_abs", "score", "eps"]


class _Force(Divergence):
    """Acts on x_t like the KL force: the weight of (3.6)."""

    needs_vjp = False
    order = 1


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Reshape [B] to broadcast over ``like`` [B, ...]."""
    return value.reshape(-1, *([1] * (like.ndim - 1)))


def weight(
    divergence: Divergence, weighting: Weighting, x0: Tensor, t: Tensor, normalizer: Tensor, schedule: Schedule
) -> Tensor:
    """The coefficient of the x0-form loss for each sample, [B, 1, ...], without gradient.

    A divergence of order p in score space is ``(a/g^2)^p`` times its x0 form, and ``(1/g)^p`` times its eps form
    (algorithm.md 1.6). The KL force acts on ``x_t = a x_0``, hence its extra ``a``.

    * ``score``: w(t) = 1 in (3.4).
    * ``eps``: coefficient 1 in the eps form, w(t) = g^p.
    * ``unit_x0``: coefficient 1 in the x0 form, w(t) = (g^2/a)^p (for KL g^2/a^2). The default.
    * ``inv_mean_abs``: ``1 / mean|x0 - D|`` in the x0 form (DMD2, SiD), D the guided prediction of the reference, which
      is ``normalizer``.
    """
    if weighting == "unit_x0":
        return torch.ones_like(_per_sample(x0.flatten(1)[:, 0], x0))
    if weighting == "inv_mean_abs":
        mean_abs = (x0 - normalizer).detach().abs().flatten(1).mean(1)
        return _per_sample(1.0 / mean_abs.clamp_min(1e-5), x0)
    alpha, sigma = schedule.coefficients(t, x0)
    power = divergence.order
    jacobian = alpha.new_ones(()) if divergence.needs_vjp else alpha
    if weighting == "score":
        return jacobian * (alpha / sigma**2) ** power
    if weighting == "eps":
        return jacobian * (alpha / sigma) ** power
    raise ValueError(f"weighting must be one of unit_x0, inv_mean_abs, score, eps, not {weighting!r}")


def divergence_loss_from_predictions(
    divergence: Divergence,
    x0: Tensor,
    t: Tensor,
    d_assistant: Tensor,
    d_reference: Tensor,
    schedule: Schedule,
    weighting: Weighting = "unit_x0",
    normalizer: Tensor | None = None,
) -> Tensor:
    """The regularizer of (3.4) [B] from both denoisers' x0-predictions at the same x_t.

    With ``needs_vjp``: ``-w d'(D_psi - D_ref)^T (D_psi - x_0)``, whose gradient flows through both predictions, plus
    ``path_weight w d(D_psi - D_ref)``. Without: the KL surrogate ``w sg[D_psi - D_ref]^T x_0`` (section 3.1).

    Args:
        divergence: The plugin.
        x0: Generated latents [B, ...].
        t: Timesteps [B] in thousandths.
        d_assistant: The assistant's prediction.
        d_reference: The reference's.
        schedule: The noise schedule of both.
        weighting: See :func:`weight`.
        normalizer: The prediction in ``inv_mean_abs``; ``d_reference`` when None.

    Raises:
        RuntimeError: The divergence needs vector-Jacobian products but no prediction depends on x_t. Training on that
            would silently optimize KL, or the reward alone (algorithm.md 1.4, fact 3).
    """
    delta = d_assistant - d_reference
    w = weight(divergence, weighting, x0, t, d_reference if normalizer is None else normalizer, schedule)
    if not divergence.needs_vjp:
        return (w * divergence.derivative(delta).detach() * x0).flatten(1).sum(1)
    if x0.requires_grad and not (d_assistant.requires_grad or d_reference.requires_grad):
        raise RuntimeError(
            "neither prediction has a graph back to x_t: equation (3.4) differentiates through both denoisers, "
            "so they must not run under no_grad or on a detached x_t"
        )
    loss = -(w * divergence.derivative(delta) * (d_assistant - x0)).flatten(1).sum(1)
    if divergence.path_weight:
        loss = loss + divergence.path_weight * w.flatten() * divergence.value(delta)
    return loss


def outer_divergence_loss(
    divergence: Divergence,
    x0: Tensor,
    t: Tensor,
    d_assistant: Tensor,
    conditional: Tensor,
    unconditional: Tensor,
    schedule: Schedule,
    guidance_scale: float,
    weighting: Weighting = "unit_x0",
) -> Tensor:
    """The regularizer under outer guidance [B]: (3.4) without guidance plus ``guidance_scale`` times (3.6).

    Both terms have one weight. For the KL force the sum is that of inner guidance with omega = 1 + guidance_scale.

    Args:
        divergence: The plugin.
        x0: Generated latents [B, ...], requiring grad.
        t: Timesteps [B] in thousandths.
        d_assistant: The assistant's prediction.
        conditional: The reference's prediction with the prompt.
        unconditional: The reference's prediction without it; used without gradient.
        schedule: The noise schedule of both.
        guidance_scale: alpha_cfg.
        weighting: See :func:`weight`.
    """
    normalizer = guided(conditional, unconditional, 1.0 + guidance_scale).detach()
    loss = divergence_loss_from_predictions(
        divergence, x0, t, d_assistant, conditional, schedule, weighting, normalizer
    )
    force = implicit_cfg_loss(x0, t, conditional, unconditional, schedule, weighting, normalizer)
    return loss + guidance_scale * force


def divergence_loss(
    divergence: Divergence | str,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    assistant: Denoiser,
    reference: Denoiser,
    schedule: Schedule,
    weighting: Weighting = "unit_x0",
) -> Tensor:
    """The regularizer of equation (3.4) [B]; its expected value is zero, its gradient is the divergence's.

    Args:
        divergence: A plugin instance, or the name of one (with its default options).
        x0: Generated latents [B, ...], requiring grad.
        t: Timesteps [B] in thousandths.
        noise: eps [B, ...].
        assistant: Denoiser of the generator's own distribution, ``(x_t, t) -> x0-prediction``.
        reference: Denoiser of the frozen reference; under inner CFG, its guided prediction.
        schedule: The noise schedule of all three.
        weighting: See :func:`weight`.
    """
    plugin: Divergence = registry.divergence(divergence) if isinstance(divergence, str) else divergence
    x_t = schedule.add_noise(x0, noise, t)
    if not plugin.needs_vjp:
        with torch.no_grad():
            d_assistant, d_reference = assistant(x_t, t), reference(x_t, t)
    else:
        d_assistant, d_reference = assistant(x_t, t), reference(x_t, t)
    return divergence_loss_from_predictions(plugin, x0, t, d_assistant, d_reference, schedule, weighting)


def guided(conditional: Tensor, unconditional: Tensor, omega: float) -> Tensor:
    """Classifier-free guidance ``D_u + omega (D_c - D_u)`` (section 1.5); linear, so x0 and score space agree."""
    return unconditional + omega * (conditional - unconditional)


def guidance_omega(scale: float, convention: Literal["omega", "one_plus"]) -> float:
    """The omega of :func:`guided` for a recipe's scale; scale 0 means no guidance, omega = 1 (section 1.5)."""
    if scale == 0:
        return 1.0
    return scale if convention == "omega" else 1.0 + scale


def implicit_cfg_loss(
    x0: Tensor,
    t: Tensor,
    conditional: Tensor,
    unconditional: Tensor,
    schedule: Schedule,
    weighting: Weighting = "unit_x0",
    normalizer: Tensor | None = None,
) -> Tensor:
    """Equation (3.6) [B]: ``w {s_ref(sg[x_t]|0) - s_ref(sg[x_t]|c)}^T x_t``, minus the implicit reward's gradient.

    Args:
        x0: Generated latents [B, ...], requiring grad.
        t: Timesteps [B] in thousandths.
        conditional: The reference's x0-prediction with the prompt; used without gradient.
        unconditional: The reference's x0-prediction without it; used without gradient.
        schedule: The noise schedule.
        weighting: As of the KL force, see :func:`weight`; ``score`` is w(t) = 1.
        normalizer: The guided prediction in ``inv_mean_abs``.

    Raises:
        ValueError: ``inv_mean_abs`` without a normalizer.
    """
    if weighting == "inv_mean_abs" and normalizer is None:
        raise ValueError("inv_mean_abs divides by the distance to the guided prediction: give it as normalizer")
    w = weight(_Force(), weighting, x0, t, conditional if normalizer is None else normalizer, schedule)
    force = (w * (unconditional - conditional)).detach()
    return (force * x0).flatten(1).sum(1)


def assistant_loss(prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """The assistant's denoising loss [B]: the mean squared error of the network's own regression target.

    For a network that predicts noise this is denoising score matching with lambda(t) = g_t^2 (algorithm.md 2.1).

    Args:
        prediction: The assistant network's raw output at ``x_t`` [B, ...].
        x0: Generated latents, without gradient to the generator.
        noise: The eps inside ``x_t``.
        t: Timesteps [B] in thousandths.
        schedule: The noise schedule, which knows what the network predicts.
    """
    return (prediction - schedule.target(x0, noise, t)).square().flatten(1).mean(1)


def two_stage_gradient(loss: Tensor, x0: Tensor) -> Tensor:
    """``d loss_b / d x0_b`` for independent per-sample losses [B]: the first stage of the two-stage backward.

    The second stage is one backward through the generator with the summed gradients (algorithm.md 1.4, fact 5). No
    parameter of a denoiser or reward collects a gradient.

    Raises:
        RuntimeError: The loss does not depend on x0.
    """
    (gradient,) = torch.autograd.grad(loss.sum(), x0)
    return gradient
