"""The learner: theta, and the Diff-Instruct* update (algorithm.md 2.1 and 2.2)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import compress
from pathlib import Path

import torch
from torch import Tensor

from rlhf_t2i.algorithm import losses, rng
from rlhf_t2i.algorithm.student import keyed_noise
from rlhf_t2i.engines import average, pickles
from rlhf_t2i.engines.average import Average
from rlhf_t2i.engines.base import Engine, learning_rate
from rlhf_t2i.errors import RunError
from rlhf_t2i.plugins import registry, traits
from rlhf_t2i.roles.context import RankContext
from rlhf_t2i.roles.denoiser import DenoiserCall, Denoising, pull_back
from rlhf_t2i.roles.dispatch import Client, Future
from rlhf_t2i.roles.local_calls import Done, LocalClient, run_local
from rlhf_t2i.roles.micro_batch import MicroBatch, Request, RewardValues
from rlhf_t2i.roles.packing import Packed, pack, size
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.roles.trained import Measured, TrainedRole, Update, read
from rlhf_t2i.utils.device import send

_PART = 2**28
"""Bytes of weights that are sent at once."""
_AVERAGE = "average.pt"
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
        self._rewards_here: Sequence[Client] = ()
        self._rewards_elsewhere: Sequence[Client] = ()
        self._rewards_late: Sequence[Client] = ()
        self._overlaps = False
        self._begun: dict[int, MicroBatch] = {}
        self._ema = None if recipe.optimization.ema is None else average.of(self.engine)

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
        self._assistant, self._reference = assistant, reference
        self._rewards_here = [client for client in rewards if isinstance(client, LocalClient)]
        far = [client for client in rewards if not isinstance(client, LocalClient)]
        # Both products need both predictions. A reward in the process of one denoiser alone is asked after its
        # prediction, for which the other denoiser would wait. In the process of both it is asked first, before there
        # are graphs to be kept.
        late = [(client.place == assistant.place) != (client.place == reference.place) for client in far]
        self._rewards_late = list(compress(far, late))
        self._rewards_elsewhere = [client for client in far if client not in self._rewards_late]
        elsewhere = [client for client in (assistant, reference, *rewards) if not isinstance(client, LocalClient)]
        # Under ZeRO-3 DeepSpeed expects that a backward pass follows each forward pass.
        self._overlaps = bool(elsewhere) and self._recipe.optimization.zero_stage != 3

    def begin(self, step: int, prompts: Sequence[str]) -> None:
        """Draw the first micro-batch of an update and start its rewards, while the assistant still trains elsewhere.

        Neither depends on the assistant. Arguments as for :meth:`step`, which goes on with it.
        """
        assert self._assistant is not None
        micro = self._draw(step, prompts, 0)
        micro.here = self._start_rewards(self._rewards_here, micro)
        idle = [client for client in micro.late if client.place != self._assistant.place]
        micro.elsewhere += self._start_rewards(idle, micro)
        micro.late = [client for client in micro.late if client not in idle]
        self._begun = {step: micro}

    def step(self, step: int, prompts: Sequence[str]) -> Update:
        """One generator update.

        While the last products of a micro-batch come back from other processes, the next one is drawn and its calls
        start. The order in which gradients are added is always that of the samples.

        Args:
            step: Counts generator updates from 0; seeds the noise and sets the warm-up.
            prompts: The global batch; this rank takes its share.
        """
        measured: Measured = {}
        seen: list[str] = []
        started: deque[MicroBatch] = deque()

        def start(number: int) -> None:
            begun = self._begun.pop(step, None) if number == 0 else None
            started.append(begun or self._draw(step, prompts, number))
            self._ask_denoisers(started[-1])

        count = len(self._context.micro_batches())
        for number in range(count):
            if not started:
                start(number)
            micro = started.popleft()
            ahead = self._overlaps and number + 1 < count
            gradient = self._gradient(micro, measured, partial(start, number + 1) if ahead else lambda: None)
            _measure(measured, _FINITE, gradient.flatten(1).isfinite().all(1))
            seen += micro.prompts
            self.engine.backward((micro.x0 * gradient).sum() / len(micro.prompts))
        norm = self.engine.step(learning_rate(self._settings, step))
        if self._ema is not None and math.isfinite(norm):
            self._update_ema((step + 1) * self._recipe.optimization.batch_size)
        samples = read(measured)
        finite = samples.pop(_FINITE)
        bad = tuple(prompt for prompt, fine in zip(seen, finite, strict=True) if not fine)
        return Update(norm, samples=samples, bad=bad)

    def _draw(self, step: int, prompts: Sequence[str], number: int) -> MicroBatch:
        """Draw x_0 of a micro-batch with its graph, and start the rewards in other processes."""
        samples = self._context.micro_batches()[number]
        chosen = [prompts[i] for i in samples]
        keys = [(self._recipe.seed, "generator", step, i) for i in samples]
        noise = keyed_noise(self._store.latent_shape, [(*k, "z") for k in keys], self._context.device)
        depths = self._store.student.sample_depths([(*k, "z", "depth") for k in keys])
        x0 = self._store.generate(self.engine, chosen, noise, depths)
        micro = MicroBatch(f"{step}.{self._context.rank}.{number}", chosen, keys, x0, depths)
        self._start_early_rewards(micro)
        return micro

    def _start_early_rewards(self, micro: MicroBatch) -> None:
        micro.elsewhere, micro.late = self._start_rewards(self._rewards_elsewhere, micro), self._rewards_late

    def _start_rewards(self, clients: Sequence[Client], micro: MicroBatch) -> list[Future[RewardValues]]:
        x0 = micro.x0.detach()
        return [client.submit(RewardRole.value_and_grad, x0, micro.prompts) for client in clients]

    def gradient_at_x0(
        self,
        request_id: str,
        x0: Tensor,
        prompts: Sequence[str],
        keys: Sequence[rng.Key],
        measured: Measured,
        depths: Tensor | None = None,
    ) -> Tensor:
        """``d L_b / d x_0b`` of every sample [B, C, h, w]: the divergence minus the scaled rewards (3.4, 3.8)."""
        micro = MicroBatch(request_id, prompts, keys, x0, depths)
        self._start_early_rewards(micro)
        self._ask_denoisers(micro)
        return self._gradient(micro, measured, lambda: None)

    def _gradient(self, micro: MicroBatch, measured: Measured, meanwhile: Callable[[], None]) -> Tensor:
        """See :meth:`gradient_at_x0`.

        Reward calls start first and are collected last, so that they run beside the denoisers where these are on
        other devices.

        Args:
            micro: Its denoisers have been asked.
            measured: Gets its measurements.
            meanwhile: Called when nothing is left to do here but to wait for other processes.
        """
        x0 = micro.x0.detach()
        here = self._start_rewards(self._rewards_here, micro) if micro.here is None else micro.here
        direct, products = self._divergence_gradient(micro, measured)
        products = run_local(products)
        rewards: list[Future[RewardValues]] = [*(Done(future.result()) for future in here), *micro.elsewhere]
        meanwhile()
        divergence = self._through_noise(micro, direct, products)
        values: RewardValues = {}
        for pending in rewards:
            values.update(pending.result())
        if self._latent_rewards is not None:
            context = _ReferenceContext(self, micro.request_id, micro.keys)
            values.update(self._latent_rewards.value_and_grad(x0, micro.prompts, context=context))
        missing = self._scales.keys() - values.keys()
        if missing:
            raise RunError(f"no process evaluated the reward {sorted(missing)[0]!r}")
        pull = self._reward_gradient(x0, values, measured, micro.depths)
        _measure(measured, "grad_norm/divergence", _norm(divergence))
        if self._scales:
            cosine = torch.cosine_similarity(divergence.flatten(1), pull.flatten(1))
            # A sample that no reward pulls has no angle: its scale is 0, or reward_steps leaves its step out.
            _measure(measured, "grad_cosine", cosine.where(_norm(pull) > 0, math.nan))
        # A value that is not finite goes on into the parameters' gradients: there the engines skip the update, on all
        # ranks alike.
        return divergence + pull

    @property
    def _outer(self) -> bool:
        """Whether guidance is a term of the loss, equation (3.6)."""
        cfg = self._recipe.algorithm.cfg
        return cfg.mode == "outer" and cfg.guidance_scale > 0

    def _ask_denoisers(self, micro: MicroBatch) -> None:
        """Add noise to x_0 and start the calls of assistant and reference, and then the late rewards."""
        leaf = micro.x0.detach().clone().requires_grad_(True)
        t, noise = self.draw(micro.keys, leaf)
        x_t = self.schedule.add_noise(leaf, noise, t)
        assert self._assistant is not None
        assert self._reference is not None
        calls = [
            DenoiserCall(self._assistant, "conditional"),
            DenoiserCall(self._reference, "both" if self._outer else "guided"),
        ]
        with_graph = self._divergence.needs_vjp
        denoising = Denoising(calls, micro.request_id, x_t.detach(), t, micro.prompts, with_graph)
        micro.request = Request(leaf, x_t, t, denoising)
        micro.elsewhere += self._start_rewards(micro.late, micro)

    def _divergence_gradient(self, micro: MicroBatch, measured: Measured) -> tuple[Tensor, list[Future[Tensor]]]:
        """The gradient of the regularizer at x_0 without its way through x_t, and the products on that way."""
        request, algorithm = micro.request, self._recipe.algorithm
        assert request is not None
        leaf, needs_vjp = request.leaf, self._divergence.needs_vjp
        predictions = [p.requires_grad_(needs_vjp) for p in request.denoising.predictions()]
        d_assistant, d_reference = predictions
        if self._outer:
            d_reference, unconditional = d_reference.unbind(1)
            loss = losses.outer_divergence_loss(
                self._divergence, leaf, request.t, d_assistant, d_reference, unconditional, self.schedule,
                algorithm.cfg.guidance_scale, algorithm.weighting,
            )  # fmt: skip
        else:
            loss = losses.divergence_loss_from_predictions(
                self._divergence, leaf, request.t, d_assistant, d_reference, self.schedule, algorithm.weighting
            )
        delta = (d_assistant - d_reference).detach()
        _measure(measured, "divergence", self._divergence.value(delta))
        _measure(measured, "delta_norm", _norm(delta))
        _measure(measured, "timestep", request.t)
        if not needs_vjp:
            return losses.two_stage_gradient(loss, leaf), []
        direct, *cotangents = torch.autograd.grad(loss.sum(), [leaf, *predictions], materialize_grads=True)
        return direct, request.denoising.submit_products(cotangents)

    def _through_noise(self, micro: MicroBatch, direct: Tensor, products: Sequence[Future[Tensor]]) -> Tensor:
        """Add the products, pulled back from x_t to x_0, to the rest of the divergence's gradient."""
        if not products:
            return direct
        request = micro.request
        assert request is not None
        (through,) = torch.autograd.grad(request.x_t, request.leaf, pull_back(products))
        return direct + through

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
        if self._scales:
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
        call = DenoiserCall(self._reference, "both")
        both = call.forward(request_id, x_t, t, prompts, keep_graph=False).result()
        return both[:, 0], both[:, 1]

    def _update_ema(self, images_seen: int) -> None:
        """SiD's EMA: half-life in images, never more than a fraction of the images seen."""
        ema = self._recipe.optimization.ema
        assert ema is not None
        assert self._ema is not None
        half_life = min(ema.half_life_kimg * 1000, ema.rampup * images_seen)
        self._ema.update(1.0 - 0.5 ** (self._recipe.optimization.batch_size / max(half_life, 1e-8)))

    def weights(self, kind: str) -> dict[str, Tensor]:
        """The ``raw`` or ``ema`` weights in float32 on the CPU, on rank 0; every rank must call it."""
        averaged = kind == "ema" and self._ema is not None
        source: Engine | Average = self._ema if averaged and self._ema is not None else self.engine
        first = self._context.rank == 0
        return {n: p.cpu().clone() for n, p in source.full_parameters() if first or p is None}

    def weight_parts(self) -> int:
        """Into how many parts :meth:`pack` should divide the raw weights: one is sent while the next is copied."""
        bytes_trained = sum(p.nbytes for _, p in self.engine.copies())
        return -(-bytes_trained // _PART)

    def pack(self, kind: str, part: int, parts: int) -> tuple[int, Packed]:
        """Weights for a generator elsewhere, and their bytes; on rank 0, and every rank must call it.

        Args:
            kind: ``raw``: what the network computes with, in its own precision. ``ema``: the merged average in float32.
            part: Which part of the raw weights.
            parts: How many there are.
        """
        first = self._context.rank == 0
        if kind == "raw":
            named = self.engine.copies(part, parts)
        else:
            assert self._ema is not None
            named = self._ema.full_parameters()
        packed = pack((name, value) for name, value in named if first)
        return size(packed), packed

    def adapter(self) -> dict[str, Tensor]:
        """The adapters alone, {} without any; complete on rank 0, and every rank must call it."""
        return {name: factor.cpu().clone() for name, factor in self.engine.adapter_factors()}

    def save(self, folder: str) -> None:
        """Copy this rank's training state, and the moving average on rank 0; see :meth:`TrainedRole.save`."""
        super().save(folder)
        if self._ema is not None:
            gathered = self.weights("ema")
            if self._context.rank == 0:
                self.writer.write(gathered, lambda copied: torch.save(copied, Path(folder) / _AVERAGE))

    def load(self, folder: str) -> str | None:
        """Restore both; see :meth:`TrainedRole.load`."""
        message = super().load(folder)
        if self._ema is not None:
            with pickles.explained(Path(folder)):
                self._ema.load(torch.load(Path(folder) / _AVERAGE, map_location="cpu", weights_only=True, mmap=True))
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
