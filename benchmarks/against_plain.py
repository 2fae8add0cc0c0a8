"""The framework beside the plain loop: the same losses and gradients first, then seconds a step, taking turns."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from baseline_diffusers import Noise, PlainLoop
from gpu_sections import StepTimes, Timer, batch, spacious
from torch import Tensor

from rlhf_t2i.algorithm.losses import assistant_loss, guidance_omega
from rlhf_t2i.algorithm.student import keyed_noise
from rlhf_t2i.families.frozen import FrozenConv2d, freeze_convs
from rlhf_t2i.families.recomputing import checkpoint_layers
from rlhf_t2i.families.store import DTYPES, ModelStore
from rlhf_t2i.recipe.schema import ROLES, Recipe
from rlhf_t2i.roles.worker import Worker, WorkerSpec

_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""Of the relative difference of gradients; bf16 keeps 8 bits, and the two sides order their sums differently."""


def side_by_side(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Check, then time.

    Both train the same networks with the same torch AdamW. Under bf16 the trained weights are bf16 too: float32
    masters of both UNets with their states fill a GPU of 80 GB alone.

    Args:
        recipe: ``placement: local``.
        steps: Timed steps of each.

    Raises:
        RuntimeError: The two do not compute the same.
    """
    dtype = DTYPES[recipe.optimization.precision]
    with _training_in(dtype):
        worker = Worker(WorkerSpec(recipe, "local", ROLES))
    worker.connect({})
    loop = plain_loop(recipe, worker)
    agreement = check(recipe, worker, loop)
    framework = StepTimes(recipe, worker.call, [])
    micro = recipe.optimization.micro_batch or recipe.optimization.batch_size
    taken: dict[str, list[float]] = {"framework": [], "plain": []}
    for number in range(2 + steps):
        ours = framework.step(number)["step"]
        prompts = batch(recipe, number)
        with _as_diffusers_has_them(worker):
            timer = Timer()
            timer.lap()
            loop.update(prompts, micro)
            theirs = timer.lap()
        if number >= 2:
            taken["framework"].append(ours)
            taken["plain"].append(theirs)
    median = {name: statistics.median(values) for name, values in taken.items()}
    images = recipe.optimization.batch_size
    return {
        "agreement": agreement,
        "batch": images,
        "steps": steps,
        "seconds": median,
        "images_a_second": {name: images / seconds for name, seconds in median.items()},
        "ratio": median["plain"] / median["framework"],
        "ratios": [theirs / ours for ours, theirs in zip(taken["framework"], taken["plain"], strict=True)],
    }


@contextmanager
def _training_in(dtype: torch.dtype) -> Iterator[None]:
    """Let the store give trained networks in the compute precision."""
    originals = {name: getattr(ModelStore, name) for name in ("generator_network", "assistant_network")}
    for name, original in originals.items():
        setattr(ModelStore, name, lambda self, base=None, original=original: original(self, base).to(dtype))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(ModelStore, name, original)


@contextmanager
def _as_diffusers_has_them(worker: Worker) -> Iterator[None]:
    """The worker's networks without the framework's layouts and frozen convolutions.

    Activations are recomputed as diffusers' ``enable_gradient_checkpointing()`` does it, unless the GPU has 120 GB:
    one graph of everything fits no smaller one.
    """
    roles, vae = worker.roles, worker._context.store.decoder.vae
    reference = roles["reference"]._network
    unets = [roles["learner"].engine.module, roles["assistant"].engine.module, reference]
    before = [(unet, unet.is_gradient_checkpointing, unet.training) for unet in (*unets, vae)]
    layered = [module for module in vae.modules() if isinstance(vars(module).get("forward"), partial)]
    for module in layered:
        del module.forward
    for frozen in (reference, vae):
        frozen.to(memory_format=torch.contiguous_format)
        for module in frozen.modules():
            if isinstance(module, FrozenConv2d):
                module.__class__ = torch.nn.Conv2d
    frugal = not spacious()
    for network, _, _ in before:
        network.train()  # diffusers checkpoints nothing else
        network.enable_gradient_checkpointing() if frugal else network.disable_gradient_checkpointing()
    try:
        yield
    finally:
        for frozen in (reference, vae):
            freeze_convs(frozen.to(memory_format=torch.channels_last))
        for network, checkpointed, training in before:
            network.enable_gradient_checkpointing() if checkpointed else network.disable_gradient_checkpointing()
            network.train(training)
        if layered:
            checkpoint_layers(vae)


def plain_loop(recipe: Recipe, worker: Worker) -> PlainLoop:
    """The plain loop over a worker's networks and optimizers."""
    learner, assistant, store = worker.roles["learner"], worker.roles["assistant"], worker._context.store
    choice = recipe.algorithm.rewards[0]
    clip = worker.roles["reward"].rewards[choice.key].clip
    cfg, ranges = recipe.algorithm.cfg, (learner._range, assistant._range)
    return PlainLoop(
        generator=learner.engine.module,
        assistant=assistant.engine.module,
        reference=worker.roles["reference"]._network,
        vae=store.decoder.vae,
        text_encoders=list(store.conditioner.encoders.values()),
        tokenizers=[store.conditioner._pipeline.tokenizer, store.conditioner._pipeline.tokenizer_2],
        clip=clip.model,
        clip_tokenizer=clip.tokenizer,
        generator_optimizer=learner.engine._optimizer,
        assistant_optimizer=assistant.engine._optimizer,
        abar=store.schedule.alphas_cumprod,
        guidance=guidance_omega(cfg.guidance_scale, cfg.convention),
        reward_scale=choice.scale,
        resolution=store.size[0],
        timestep=int(store.student.timesteps[0]),
        ranges=tuple((int(first), int(last)) for first, last in ranges),
        max_grad_norm=recipe.optimization.generator.max_grad_norm,
    )


def check(recipe: Recipe, worker: Worker, loop: PlainLoop) -> dict[str, float]:
    """Relative differences of the assistant's loss, the latents and the gradient at x_0, on the same noise.

    Raises:
        RuntimeError: One is larger than the precision explains, or nothing was computed.
    """
    prompts = batch(recipe, 0)[: recipe.optimization.micro_batch]
    keys = [(recipe.seed, "check", i) for i in range(len(prompts))]
    learner, assistant, store = worker.roles["learner"], worker.roles["assistant"], worker._context.store
    drawn = keyed_noise(store.latent_shape, [(*k, "z") for k in keys], worker.device)
    z = drawn(0)
    t, eps = learner.draw(keys, z)
    noise = Noise(z, t, eps)
    cond = store.conditioner.encode(prompts)
    with torch.no_grad():
        x0 = store.generate(learner.engine, prompts, drawn)
        x_t = store.schedule.add_noise(x0, eps, t)
        raw = store.predict(assistant.engine, x_t, t, cond)
        ours = assistant_loss(raw, x0, eps, t, store.schedule).mean()
        theirs = loop.assistant_loss(prompts, noise)
        embeds = loop.encode(prompts)
        plain_x0 = loop.one_step(z, embeds)
    gradient = learner.gradient_at_x0("check", x0, prompts, keys, {})
    leaf = x0.clone().requires_grad_(True)
    with _as_diffusers_has_them(worker):
        # The loop's loss is the batch's mean, the framework's gradient every sample's own.
        loss = loop.generator_loss(leaf, prompts, embeds, noise) * len(prompts)
        (plain_gradient,) = torch.autograd.grad(loss, leaf)
    found = {
        "assistant loss": _difference(ours, theirs),
        "x_0": _difference(x0, plain_x0),
        "gradient at x_0": _difference(gradient, plain_gradient),
    }
    for name, value in found.items():
        if not value < _TOLERANCE[recipe.optimization.precision]:
            raise RuntimeError(f"the plain loop's {name} differs from the framework's by {value:.2e} of its size")
    return found


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative, by norm; a zero or a NaN gives NaN."""
    return float((ours - theirs).float().norm() / ours.float().norm())
