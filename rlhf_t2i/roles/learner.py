"""The learner: theta, and the Diff-Instruct* update (algorithm.md 2.1 and 2.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf_t2i.algorithm import losses, rng
from rlhf_t2i.algorithm.student import keyed_noise
from rlhf_t2i.engines import pickles
from rlhf_t2i.engines.base import learning_rate
from rlhf_t2i.errors import RunError
from rlhf_t2i.plugins import registry, traits
from rlhf_t2i.roles.context import RankContext
from rlhf_t2i.roles.denoiser import DenoiserCall, denoise
from rlhf_t2i.roles.dispatch import Client
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.roles.trained import Measured, TrainedRole, Update, read
from rlhf_t2i.utils.device import send

_FINITE = "finite"  # among the measurements: whether a sample's gradient at x_0 is


class LearnerRole(TrainedRole):
    """Trains the generator: the gradients of all terms are added at x_0, then one backward goes through theta."""

    def __init__(self, context: RankContext) -> None:
        recipe = context.recipe
        self._context, self._recipe, self._store = context, recipe, context.store
        self.device = context.device
        self._settings = recipe.optimization.generator
        self.engine = context.engine("learner", context.store.generator_network, self._settings)
        self.schedule = context.store.schedule
        timesteps = recipe.algorithm.timesteps
        self._range, self._law = self._store.timestep_range(timesteps, "generator"), self._store.timestep_law(timesteps)
        choice = recipe.algorithm.divergence
        self._divergence = registry.divergence(choice.name, **choice.options)
        self._scales = {reward.key: reward.scale for reward in recipe.algorithm.rewards}
        self._latent_rewards = self._build_latent_rewards()
        self._assistant: Client | None = None
        self._reference: Client | None = None
        self._rewards: Sequence[Client] = ()
        self._ema: dict[str, Tensor] | None = None
        if recipe.optimization.ema is not None:
            self._ema = self._gather()

    def _build_latent_rewards(self) -> RewardRole | None:
        """Rewards that need the reference denoiser live here, beside its client."""
        on_latents = [
            c for c in self._recipe.algorithm.rewards if traits.resolve(self._recipe).reward(c.key).on_latents
        ]
        if not on_latents:
            return None
        return RewardRole(
            {choice.key: registry.reward(choice.name, **choice.options) for choice in on_latents},
            None,
            device=self._context.device,
            failures_dir=self._context.spec.failures,
            timeouts=self._context.spec.timeouts(on_latents),
        )

    def connect(self, assistant: Client, reference: Client, rewards: Sequence[Client]) -> None:
        """Set where the other roles are called."""
        self._assistant, self._reference, self._rewards = assistant, reference, rewards

    def step(self, step: int, prompts: Sequence[str]) -> Update:
        """One generator update.

        Args:
            step: Counts generator updates from 0; seeds the noise and sets the warm-up.
            prompts: The global batch; this rank takes its share.
        """
        measured: Measured = {}
        seen: list[str] = []
        for number, micro in enumerate(self._context.micro_batches()):
            chosen = [prompts[i] for i in micro]
            keys = [(self._recipe.seed, "generator", step, i) for i in micro]
            noise = keyed_noise(self._store.latent_shape, [(*k, "z") for k in keys], self._context.device)
            depths = self._store.student.sample_depths([(*k, "z", "depth") for k in keys])
            x0 = self._store.generate(self.engine, chosen, noise, depths)
            request_id = f"{step}.{self._context.rank}.{number}"
            gradient = self.gradient_at_x0(request_id, x0.detach(), chosen, keys, measured, depths)
            _measure(measured, _FINITE, gradient.flatten(1).isfinite().all(1))
            seen += chosen
            self.engine.backward((x0 * gradient).sum() / len(micro))
        norm = self.engine.step(learning_rate(self._settings, step))
        if self._ema is not None and math.isfinite(norm):
            self._update_ema((step + 1) * self._recipe.optimization.batch_size)
        samples = read(measured)
        finite = samples.pop(_FINITE)
        bad = tuple(prompt for prompt, fine in zip(seen, finite, strict=True) if not fine)
        return Update(norm, samples=samples, bad=bad)

    def gradient_at_x0(
        self,
        request_id: str,
        x0: Tensor,
        prompts: Sequence[str],
        keys: Sequence[rng.Key],
        measured: Measured,
        depths: Tensor | None = None,
    ) -> Tensor:
        """``d L_b / d x_0b`` of every sample [B, C, h, w]: the divergence minus the scaled rewards (3.4, 3.8).

        Reward calls start first and are collected last, so that they run beside the denoisers where these are on
        other devices.
        """
        rewards = [client.submit(RewardRole.value_and_grad, x0, prompts) for client in self._rewards]
        leaf = x0.clone().requires_grad_(True)
        divergence = self._divergence_gradient(request_id, leaf, prompts, keys, measured)
        values: dict[str, tuple[Tensor, Tensor]] = {}
        for pending in rewards:
            values.update(pending.result())
        if self._latent_rewards is not None:
            context = _ReferenceContext(self, request_id, keys)
            values.update(self._latent_rewards.value_and_grad(x0, prompts, context=context))
        missing = self._scales.keys() - values.keys()
        if missing:
            raise RunError(f"no process evaluated the reward {sorted(missing)[0]!r}")
        pull = self._reward_gradient(x0, values, measured, depths)
        _measure(measured, "grad_norm/divergence", _norm(divergence))
        _measure(measured, "grad_cosine", torch.cosine_similarity(divergence.flatten(1), pull.flatten(1)))
        # A value that is not finite goes on into the parameters' gradients: there the engines skip the update, on all
        # ranks alike.
        return divergence + pull

    def _divergence_gradient(
        self, request_id: str, x0: Tensor, prompts: Sequence[str], keys: Sequence[rng.Key], measured: Measured
    ) -> Tensor:
        """The gradient of the regularizer, and under outer CFG of equation (3.6)."""
        algorithm = self._recipe.algorithm
        t, noise = self.draw(keys, x0)
        x_t = self.schedule.add_noise(x0, noise, t)
        outer = algorithm.cfg.mode == "outer" and algorithm.cfg.guidance_scale > 0
        assert self._assistant is not None
        assert self._reference is not None
        calls = [
            DenoiserCall(self._assistant, "conditional"),
            DenoiserCall(self._reference, "both" if outer else "guided"),
        ]
        d_assistant, d_reference = denoise(calls, request_id, x_t, t, prompts, self._divergence.needs_vjp)
        if outer:
            d_reference, unconditional = d_reference.unbind(1)
            loss = losses.outer_divergence_loss(
                self._divergence, x0, t, d_assistant, d_reference, unconditional, self.schedule,
                algorithm.cfg.guidance_scale, algorithm.weighting,
            )  # fmt: skip
        else:
            loss = losses.divergence_loss_from_predictions(
                self._divergence, x0, t, d_assistant, d_reference, self.schedule, algorithm.weighting
            )
        gradient = losses.two_stage_gradient(loss, x0)
        delta = (d_assistant - d_reference).detach()
        _measure(measured, "divergence", self._divergence.value(delta))
        _measure(measured, "delta_norm", _norm(delta))
        _measure(measured, "timestep", t)
        return gradient

    def _reward_gradient(
        self, x0: Tensor, values: Mapping[str, tuple[Tensor, Tensor]], measured: Measured, depths: Tensor | None
    ) -> Tensor:
        """``-sum_i alpha_i d r_i / d x_0``; zero for samples whose step the recipe's ``reward_steps`` leaves out."""
        pull = torch.zeros_like(x0)
        rewarded = None
        if depths is not None and self._recipe.algorithm.reward_steps == "last":
            rewarded = send(depths == self._store.student.steps, x0.device).to(x0).reshape(-1, *[1] * (x0.ndim - 1))
        for label, scale in self._scales.items():
            value, gradient = values[label]
            scaled = -scale * gradient.to(x0)
            if rewarded is not None:
                scaled = scaled * rewarded
            _measure(measured, f"reward/{label}", value)
            _measure(measured, f"grad_norm/reward/{label}", _norm(scaled))
            pull = pull + scaled
        _measure(measured, "grad_norm/reward", _norm(pull))
        return pull

    def draw(self, keys: Sequence[rng.Key], like: Tensor, purpose: str = "") -> tuple[Tensor, Tensor]:
        """Timesteps [B] and noise like the latents, from the samples' own streams."""
        t = self.schedule.sample_timesteps(self._law, *self._range, [(*k, f"{purpose}t") for k in keys])
        noise = rng.normal(like.shape[1:], [(*k, f"{purpose}noise") for k in keys])
        return send(t, like.device), send(noise, like.device)

    def reference_branches(
        self, request_id: str, x_t: Tensor, t: Tensor, prompts: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """The reference's predictions with and without the prompt, without a graph."""
        assert self._reference is not None
        (both,) = denoise([DenoiserCall(self._reference, "both")], request_id, x_t, t, prompts, with_graph=False)
        return both[:, 0], both[:, 1]

    def _update_ema(self, images_seen: int) -> None:
        """SiD's EMA: half-life in images, never more than a fraction of the images seen."""
        ema = self._recipe.optimization.ema
        assert ema is not None
        assert self._ema is not None
        half_life = min(ema.half_life_kimg * 1000, ema.rampup * images_seen)
        beta = 0.5 ** (self._recipe.optimization.batch_size / max(half_life, 1e-8))
        for name, parameter in self.engine.full_parameters():
            if self._context.rank == 0:
                self._ema[name].lerp_(parameter.cpu(), 1.0 - beta)

    def _gather(self) -> dict[str, Tensor]:
        """The whole network in float32 on the CPU; empty on ranks other than 0, which still take part."""
        first = self._context.rank == 0
        return {n: p.cpu().clone() for n, p in self.engine.full_parameters() if first or p is None}

    def weights(self, kind: str) -> dict[str, Tensor]:
        """The ``raw`` or ``ema`` weights on rank 0; every rank must call it."""
        if kind == "ema" and self._ema is not None:
            return self._ema
        return self._gather()

    def adapter(self) -> dict[str, Tensor]:
        """The adapters alone, {} without any; complete on rank 0, and every rank must call it."""
        return {name: factor.cpu().clone() for name, factor in self.engine.adapter_factors()}

    def save(self, folder: str) -> None:
        """Write this rank's training state, and the moving average on rank 0."""
        super().save(folder)
        if self._ema is not None and self._context.rank == 0:
            torch.save(self._ema, Path(folder) / "average.pt")

    def load(self, folder: str) -> str | None:
        """Restore both; see :meth:`TrainedRole.load`."""
        message = super().load(folder)
        if self._ema is not None and self._context.rank == 0:
            with pickles.explained(Path(folder)):
                self._ema = torch.load(Path(folder) / "average.pt", map_location="cpu", weights_only=True)
        return message


class _ReferenceContext:
    """The :class:`rlhf_t2i.plugins.LatentContext` of one micro-batch."""

    def __init__(self, learner: LearnerRole, request_id: str, keys: Sequence[rng.Key]) -> None:
        self._learner, self._ticket, self._keys = learner, request_id, keys

    def sample_timesteps(self, batch: int) -> Tensor:
        like = torch.empty(batch, 1, device=self._learner.device)
        return self._learner.draw(self._keys[:batch], like, "latent reward ")[0]

    def sample_noise(self, like: Tensor) -> Tensor:
        return self._learner.draw(self._keys[: len(like)], like, "latent reward ")[1]

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self._learner.schedule.add_noise(latents, noise, t)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._learner.schedule.coefficients(t, like)

    def reference(self, x_t: Tensor, t: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self._learner.reference_branches(f"{self._ticket}.latent", x_t, t, prompts)


def _norm(value: Tensor) -> Tensor:
    """The L2 norm of every sample [B]."""
    return value.flatten(1).norm(dim=1)


def _measure(measured: Measured, name: str, values: Tensor) -> None:
    measured.setdefault(name, []).append(values.detach())
