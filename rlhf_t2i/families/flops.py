"""Work of a training step: which network each role runs, how often per image, and model FLOPs per second.

A multiply-add counts two FLOPs. Forwards are counted on the meta device (:mod:`rlhf_t2i.families.counting`); the text
encoders (under 1% of a step at 1024 px) are left out. Every product ``y = x w`` of a forward F has two gradients of the
cost of F, ``dx`` and ``dw``: a trained network needs both (3 F with the forward), a frozen one through which a gradient
flows ``dx`` alone (2 F), and so does one whose adapters alone are trained, whose own products are small beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from rlhf_t2i.algorithm.losses import guidance_omega
from rlhf_t2i.plugins import traits
from rlhf_t2i.recipe.schema import Guidance, Recipe

NETWORK, DECODER = "network", "decoder"
"""Names of parts; a reward's is ``reward:LABEL``."""


@dataclass(frozen=True)
class Work:
    """What one role does with one network per image of an update.

    Attributes:
        role: The role, ``decoder`` or ``reward:LABEL``.
        part: The network.
        forwards: Forwards.
        backwards: Gradients in the network's input.
        weights: Gradients in the network's weights.
    """

    role: str
    part: str
    forwards: float
    backwards: float = 0.0
    weights: float = 0.0

    def flops(self, forward: float, recomputed: bool = False) -> float:
        """FLOPs per image.

        Args:
            forward: FLOPs of one forward.
            recomputed: Whether every backward runs the forward again: work of the machine, not of the model.
        """
        return forward * (self.forwards + self.backwards * (2.0 if recomputed else 1.0) + self.weights)


def generator_step(recipe: Recipe) -> list[Work]:
    """Work per image of a generator update (algorithm.md 2.1)."""
    algorithm, plugins = recipe.algorithm, traits.resolve(recipe)
    through = 1.0 if plugins.divergence.needs_vjp else 0.0
    branches = guided_branches(algorithm.cfg)
    # Outer guidance: the branch without the prompt carries no gradient.
    outer = 1.0 if algorithm.cfg.mode == "outer" and algorithm.cfg.guidance_scale > 0 else 0.0
    steps = recipe.student.steps
    found = [
        # Of K steps the one that is trained is uniform in 1..K; those before it run without a graph.
        Work("learner", NETWORK, 1 + (steps - 1) / 2, 1.0, 0.0 if recipe.optimization.generator.lora else 1.0),
        Work("assistant", NETWORK, 1.0, through),
        Work("reference", NETWORK, branches + outer + 2 * plugins.reference_calls, branches * through),
    ]
    rewards = [reward.key for reward in plugins.trained_on_images]
    if rewards:
        # One decode serves all rewards; each pulls its own gradient back through the decoder.
        found.append(Work(DECODER, DECODER, 1.0, float(len(rewards))))
    return found + [Work(f"reward:{key}", f"reward:{key}", 1.0, 1.0) for key in rewards]


def assistant_step(recipe: Recipe) -> list[Work]:
    """Work per image of one assistant update."""
    trained = 0.0 if recipe.optimization.assistant.lora else 1.0
    return [
        Work("generator", NETWORK, (recipe.student.steps + 1) / 2),
        Work("assistant", NETWORK, 1.0, 1.0, trained),
    ]


def lesson(recipe: Recipe, key: str) -> list[Work]:
    """Work per image of a lesson of a reward that learns; its own small network and its scorer are not known."""
    drawing = Work("generator", NETWORK, float(recipe.student.steps))
    return [drawing, Work(DECODER, DECODER, 1.0), Work(f"reward:{key}", f"reward:{key}", 1.0)]


def measuring(recipe: Recipe) -> list[Work]:
    """Work per image of evaluation and monitors."""
    rewards = [reward.key for reward in traits.resolve(recipe).rewards if not reward.on_latents]
    drawing = [Work("generator", NETWORK, float(recipe.student.steps)), Work(DECODER, DECODER, 1.0)]
    return drawing + [Work(f"reward:{key}", f"reward:{key}", 1.0) for key in rewards]


def guided_branches(cfg: Guidance) -> int:
    """Branches of the reference that carry a gradient in a generator step."""
    return 1 if cfg.mode == "outer" or guidance_omega(cfg.guidance_scale, cfg.convention) == 1.0 else 2


def forwards(recipe: Recipe) -> Mapping[str, int]:
    """FLOPs of one forward of every network in a step, by part; 0 for a reward whose network is not known.

    Raises:
        UsageError: A damaged model folder, or a size that the decoder cannot produce.
    """
    return _forwards(recipe.model_dump_json())


@cache
def _forwards(text: str) -> Mapping[str, int]:
    from rlhf_t2i.families.footprints import Footprints

    recipe = Recipe.model_validate_json(text)
    networks = Footprints(recipe)
    found = {NETWORK: networks.network().flops(), DECODER: networks.decoder().flops()}
    for key, (_, network) in networks.rewards.items():
        found[f"reward:{key}"] = 0 if network is None else network.flops()
    return found


def of_update(recipe: Recipe, rounds: float) -> float:
    """Model FLOPs of a generator update and ``rounds`` assistant updates; recomputed activations do not count."""
    counted = forwards(recipe)

    def total(works: Iterable[Work]) -> float:
        return sum(work.flops(counted[work.part]) for work in works)

    return recipe.optimization.batch_size * (total(generator_step(recipe)) + rounds * total(assistant_step(recipe)))


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
