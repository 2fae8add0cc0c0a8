"""Model FLOPs of a training step: forwards counted on the meta device, backwards derived from them.

A multiply-add counts two. A forward is what torch's ``FlopCounterMode`` finds in matrix products, convolutions and
attention; normalizations, activations and the text encoders (under 1% of a step at 1024 px) are left out. The work of
a backward follows from its forward F, whose every product ``y = x w`` has two gradients of the cost of F:

- a trained network needs both, ``dx`` and ``dw``: 3 F with the forward;
- a frozen one through which a gradient flows (assistant and reference in the generator step, decoder, reward) needs
  ``dx`` alone: 2 F; so does one whose adapters alone are trained, whose own products are small beside it;
- one that only predicts (the generator drawing samples, denoisers under the KL): F.

Recomputed activations are the implementation's choice and do not count: this is the model's work, not the machine's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from rlhf_t2i.algorithm.losses import guidance_omega
from rlhf_t2i.plugins import traits
from rlhf_t2i.plugins.base import Footprint
from rlhf_t2i.recipe.schema import Guidance, Optimizer, Recipe

TRAINED, PULLED, PREDICTED = 3, 2, 1
"""Forwards' worth of work of a trained network, of a frozen one with a gradient through it, and of a prediction."""

SDXL_AT_1024 = 6_761_236_398_080
"""SDXL's UNet at 1024 px: its shapes take seconds to flow through 70 transformer blocks. A slow test counts it."""


@dataclass(frozen=True)
class Forward:
    """FLOPs of one sample's forward; a network whose configuration is not at hand counts 0.

    Attributes:
        unet: The UNet (generator, assistant and reference share an architecture).
        decoder: The VAE's decoder.
        rewards: By label, the reward's image tower.
    """

    unet: int
    decoder: int
    rewards: dict[str, int]


@dataclass(frozen=True)
class StepFlops:
    """FLOPs an image by role, in the generator step and in one assistant step."""

    generator: dict[str, int]
    assistant: dict[str, int]

    def update(self, images: int, rounds: float) -> float:
        """FLOPs of a generator update of ``images`` and ``rounds`` assistant updates of as many."""
        return images * (sum(self.generator.values()) + rounds * sum(self.assistant.values()))


def of_recipe(recipe: Recipe) -> StepFlops:
    """Count the networks a recipe names; counted once, since it is asked at every step.

    Raises:
        UsageError: A damaged model folder, or a resolution the VAE cannot produce.
    """
    return _of_recipe(recipe.model_dump_json())


@cache
def _of_recipe(text: str) -> StepFlops:
    from rlhf_t2i.tools.planning.networks import Networks

    recipe = Recipe.model_validate_json(text)
    return of_networks(recipe, Networks(recipe))


def of_networks(recipe: Recipe, networks: Any) -> StepFlops:
    """As :func:`of_recipe`, from the configurations found already (a ``planning.networks.Networks``)."""
    trained = [choice.key for choice in recipe.algorithm.rewards]
    size = networks.latents[1]
    forward = Forward(
        unet=unet(networks.unet, size) if networks.unet else 0,
        decoder=decoder(networks.vae, size) if networks.vae and trained else 0,
        rewards={label: image_tower(networks.rewards[label], recipe.models.height or 1024) for label in trained},
    )
    return of_step(recipe, forward)


def of_step(recipe: Recipe, forward: Forward) -> StepFlops:
    """The work of Algorithm 1 from one forward of each network (algorithm.md 2.1)."""

    def trained(optimizer: Optimizer) -> int:
        return PULLED if optimizer.lora else TRAINED

    algorithm = recipe.algorithm
    resolved = traits.resolve(recipe)
    gradient = PULLED if resolved.divergence.needs_vjp else PREDICTED
    cfg = algorithm.cfg
    reference = guided_branches(cfg) * gradient
    if cfg.mode == "outer" and cfg.guidance_scale > 0:
        reference += PREDICTED  # the branch without the prompt carries no gradient
    generator = {
        "learner": trained(recipe.optimization.generator) * forward.unet,
        "assistant": gradient * forward.unet,
        "reference": (reference + 2 * PREDICTED * resolved.reference_calls) * forward.unet,
    }
    images = [reward.key for reward in resolved.trained_on_images]
    if images:
        # One decode serves all rewards; each pulls its own gradient back through the decoder.
        generator["decoder"] = (PREDICTED + len(images) * (PULLED - PREDICTED)) * forward.decoder
        generator["rewards"] = PULLED * sum(forward.rewards[label] for label in images)
    assistant = trained(recipe.optimization.assistant) * forward.unet
    return StepFlops(generator, {"generator": PREDICTED * forward.unet, "assistant": assistant})


def guided_branches(cfg: Guidance) -> int:
    """Branches of the reference that carry a gradient in a generator step."""
    return 1 if cfg.mode == "outer" or guidance_omega(cfg.guidance_scale, cfg.convention) == 1.0 else 2


def utilization(flops: float, seconds: float, rates: Sequence[float | None]) -> float | None:
    """The share of the devices' bf16 matmul rate that a step's model FLOPs make up.

    Args:
        flops: Of the step.
        seconds: Its wall time.
        rates: FLOP/s of each process's own device, as :func:`matmul_rate` measured them; None where it is a CPU.

    Returns:
        A number between 0 and 1; None where a process has no GPU, or nothing was counted.
    """
    found = [rate for rate in rates if rate]
    if not flops or not found or len(found) < len(rates):
        return None
    return flops / (seconds * sum(found))


def matmul_rate(size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of bf16 products of two square matrices on this process's CUDA device, as it runs now."""
    import torch

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        torch.mm(a, b)
    end.record()
    torch.cuda.synchronize()
    return repeats * 2 * size**3 / (start.elapsed_time(end) / 1000)


def count(call: Callable[[], Any]) -> int:
    """FLOPs of a call on meta tensors."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def unet(config: dict[str, Any], size: int, context: int = 77) -> int:
    """A UNet's forward on one sample of ``size`` x ``size`` latents and ``context`` text tokens."""
    from rlhf_t2i.families.published import SDXL_UNET

    if (size, context) == (128, 77) and all(config.get(key) == value for key, value in SDXL_UNET.items()):
        return SDXL_AT_1024
    return fresh_unet(config, size, context)


def fresh_unet(config: dict[str, Any], size: int, context: int = 77) -> int:
    """As :func:`unet`, counted now in any case."""
    return _unet(json.dumps(config, sort_keys=True), size, context)


@cache
def _unet(text: str, size: int, context: int) -> int:
    from rlhf_t2i.families.published import build_on_meta, unet_inputs

    config = json.loads(text)
    network, inputs = build_on_meta(config), unet_inputs(config, size, context=context)
    return count(lambda: network(**inputs))


def decoder(config: dict[str, Any], size: int) -> int:
    """The VAE decoder's forward on one sample of ``size`` x ``size`` latents."""
    return _decoder(json.dumps(config, sort_keys=True), size)


@cache
def _decoder(text: str, size: int) -> int:
    import torch

    from rlhf_t2i.families.published import build_on_meta

    config = json.loads(text)
    network = build_on_meta(config)
    with torch.device("meta"):
        latents = torch.empty(1, config.get("latent_channels", 4), size, size)
        return count(lambda: network.decode(latents, return_dict=False))


def image_tower(footprint: Footprint | None, size: int = 224) -> int:
    """The forward of a reward's network on one image of ``size`` pixels; 0 where the network is not known."""
    import torch

    if footprint is None:
        return 0
    with torch.device("meta"):
        network, images = footprint.build(), torch.empty(1, 3, size, size)
        return count(lambda: network(images))
