"""The assistant diffusion: learns the generator's own score online, and serves it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from rlhf_t2i.algorithm import rng
from rlhf_t2i.algorithm.losses import assistant_loss
from rlhf_t2i.engines.base import learning_rate
from rlhf_t2i.roles.context import RankContext
from rlhf_t2i.roles.denoiser import Branch, DenoiserServer
from rlhf_t2i.roles.dispatch import Client, Future
from rlhf_t2i.roles.generator import GeneratorRole
from rlhf_t2i.roles.trained import TrainedRole, Update
from rlhf_t2i.utils.device import send


class AssistantRole(DenoiserServer, TrainedRole):
    """psi: trained by denoising score matching on the generator's samples (algorithm.md 2.1)."""

    def __init__(self, context: RankContext) -> None:
        # A compiled backward computes all gradients of its graph or none: without this, those of the weights too, which
        # doubles its work. Otherwise autograd leaves out what nobody asks for.
        serving = self._frozen if context.recipe.optimization.compile else nullcontext
        super().__init__(self._x0, context.callers, serving)
        self._context, self._store = context, context.store
        self._settings = context.recipe.optimization.assistant
        self.engine = context.engine("assistant", context.store.assistant_network, self._settings)
        timesteps = context.recipe.algorithm.timesteps
        self._range, self._law = self._store.timestep_range(timesteps, "assistant"), self._store.timestep_law(timesteps)
        self._generator: Client | None = None
        self._samples: dict[int, list[Future[Tensor]]] = {}

    def connect(self, generator: Client) -> None:
        """Set where samples come from."""
        self._generator = generator

    def train(self, round_index: int, prompts: Sequence[str]) -> Update:
        """One update on fresh samples; every rank gets the prompts of the whole batch and takes its share.

        Args:
            round_index: Counts assistant updates from the start of the run; seeds the noise and sets the warm-up.
            prompts: The global batch.
        """
        seed, store, schedule = self._context.recipe.seed, self._store, self._store.schedule
        self.request_samples({round_index: prompts})
        losses = []
        for micro, samples in zip(self._context.micro_batches(), self._samples.pop(round_index), strict=True):
            chosen = [prompts[i] for i in micro]
            keys = [(seed, "assistant", round_index, i) for i in micro]
            cond = store.conditioner.encode(chosen)  # while the samples are drawn elsewhere
            x0 = send(samples.result(), self._context.device)
            t = send(schedule.sample_timesteps(self._law, *self._range, [(*k, "t") for k in keys]), x0.device)
            noise = send(rng.normal(x0.shape[1:], [(*k, "noise") for k in keys]), x0.device)
            x_t = schedule.add_noise(x0, noise, t)
            raw = store.predict(self.engine, x_t, t, cond)
            loss = assistant_loss(raw, x0, noise, t, schedule).mean()
            self.engine.backward(loss)
            losses.append(loss.detach())
        norm = self.engine.step(learning_rate(self._settings, round_index))
        return Update(norm, loss=sum(torch.stack(losses).cpu().tolist()) / len(losses))

    def request_samples(self, batches: Mapping[int, Sequence[str]]) -> None:
        """Ask for the samples of coming updates; a generator elsewhere draws them while the assistant trains.

        Args:
            batches: The prompts of each update, by its number. Until then the generator must not be updated.
        """
        assert self._generator is not None
        for round_index, prompts in batches.items():
            if round_index in self._samples:
                continue
            self._samples[round_index] = []
            for micro in self._context.micro_batches():
                chosen = [prompts[i] for i in micro]
                keys = [(self._context.recipe.seed, "assistant", round_index, i, "z") for i in micro]
                drawn = self._generator.submit(GeneratorRole.sample, chosen, keys, "raw", True)
                self._samples[round_index].append(drawn)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """The network without gradients of its weights."""
        trained = [p for p in self.engine.module.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def _x0(self, x_t: Tensor, t: Tensor, prompts: Sequence[str], branch: Branch) -> Tensor:
        # Through the bare module: the engine's own forward scales and records gradients meant for training.
        return self._store.denoise(self.engine.module, x_t, t, self._store.conditioner.encode(prompts))
