"""A micro-batch of the learner between the start of its calls and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rlhf_t2i.algorithm import rng
from rlhf_t2i.roles.denoiser import Denoising
from rlhf_t2i.roles.dispatch import Client, Future

RewardValues = dict[str, tuple[Tensor, Tensor]]
"""By label, the values [B] and their gradients at x_0 [B, C, h, w]."""


@dataclass
class Request:
    """What the learner asks the denoisers, with the graph from ``leaf`` to ``x_t``.

    Attributes:
        leaf: x_0 [B, C, h, w], where the divergence's gradient is taken.
        x_t: Noised latents, a function of ``leaf``.
        t: Timesteps [B] in thousandths.
        denoising: The calls.
    """

    leaf: Tensor
    x_t: Tensor
    t: Tensor
    denoising: Denoising


@dataclass
class MicroBatch:
    """Samples whose x_0 is drawn.

    Attributes:
        request_id: Names its calls.
        prompts: B prompts.
        keys: The randomness of each sample.
        x0: [B, C, h, w]; in training with the graph through theta.
        depths: The step at which each sample ended [B]; None for the last one.
        elsewhere: The rewards in other processes, which work on it.
        late: The rewards in other processes that are asked after the denoisers.
        here: The rewards in this process; started last, since they share the learner's device.
        request: What the denoisers are asked; None before that.
    """

    request_id: str
    prompts: Sequence[str]
    keys: Sequence[rng.Key]
    x0: Tensor
    depths: Tensor | None
    elsewhere: list[Future[RewardValues]] = field(default_factory=list)
    late: Sequence[Client] = ()
    here: list[Future[RewardValues]] | None = None
    request: Request | None = None
