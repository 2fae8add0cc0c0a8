"""Denoisers behind autograd: a divergence never learns where the networks live.

A denoiser serves two stateless calls: ``forward`` gives an x0-prediction, ``vjp`` the vector-Jacobian product with
respect to x_t. The graph kept between them is only a cache, keyed by a request_id: where it was lost (a restart, an
eviction) ``vjp`` recomputes it from its arguments, so every call may be repeated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Branch = Literal["conditional", "guided", "both"]
"""``conditional``: with the prompt. ``guided``: classifier-free guidance. ``both``: [2, B, ...], with and without the
prompt; only the first carries a gradient."""


class Future(Protocol):
    """The result of a call that may still be running elsewhere."""

    def result(self) -> Any:
        """Wait for it."""


@dataclass
class Deferred:
    """A local call, made when its result is asked for: remote calls started before it run meanwhile."""

    call: Callable[[], Any]

    def result(self) -> Any:
        """Make the call."""
        return self.call()


class DenoiserClient(Protocol):
    """Where a denoiser is called from: plain (the same process) or remote (an actor group)."""

    def submit_forward(
        self, request_id: str, x_t: Tensor, t: Tensor, prompts: Sequence[str], branch: Branch, keep_graph: bool
    ) -> Future:
        """Begin a prediction."""

    def submit_vjp(
        self, request_id: str, x_t: Tensor, t: Tensor, prompts: Sequence[str], branch: Branch, cotangent: Tensor
    ) -> Future:
        """Begin a vector-Jacobian product."""


class DenoiserServer:
    """The server side: predictions with a graph kept for the product that usually follows.

    Args:
        predict: ``(x_t, t, prompts, branch) -> x0-prediction``, differentiable in x_t.
        kept: How many graphs are kept; one micro-batch a caller needs one.
    """

    def __init__(self, predict: Callable[[Tensor, Tensor, Sequence[str], Branch], Tensor], kept: int = 4) -> None:
        self._predict, self._kept = predict, kept
        self._graphs: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    def forward(
        self, request_id: str, x_t: Tensor, t: Tensor, prompts: Sequence[str], branch: Branch, keep_graph: bool
    ) -> Tensor:
        """The x0-prediction, detached."""
        if not keep_graph:
            with torch.no_grad():
                return self._predict(x_t, t, prompts, branch)
        output = self._remember(request_id, x_t, t, prompts, branch)[1]
        return output.detach()

    def vjp(
        self, request_id: str, x_t: Tensor, t: Tensor, prompts: Sequence[str], branch: Branch, cotangent: Tensor
    ) -> Tensor:
        """``cotangent^T d prediction / d x_t``; parameters collect no gradient."""
        entry = self._graphs.pop(request_id, None)
        if entry is None:
            self._remember(request_id, x_t, t, prompts, branch)
            entry = self._graphs.pop(request_id)
        leaf, output = entry
        (gradient,) = torch.autograd.grad(output, leaf, cotangent.to(output.dtype))
        return gradient

    def _remember(
        self, request_id: str, x_t: Tensor, t: Tensor, prompts: Sequence[str], branch: Branch
    ) -> tuple[Tensor, Tensor]:
        leaf = x_t.detach().requires_grad_(True)
        with torch.enable_grad():
            output = self._predict(leaf, t, prompts, branch)
        self._graphs[request_id] = (leaf, output)
        while len(self._graphs) > self._kept:
            self._graphs.popitem(last=False)
        return leaf, output


@dataclass(frozen=True)
class DenoiserCall:
    """One denoiser of a step and the branch asked of it."""

    client: DenoiserClient
    branch: Branch


def denoise(
    calls: Sequence[DenoiserCall], request_id: str, x_t: Tensor, t: Tensor, prompts: Sequence[str], with_graph: bool
) -> tuple[Tensor, ...]:
    """Ask all denoisers of a step at once; their forwards, and then their products, run side by side.

    Args:
        calls: Which denoisers.
        request_id: Names this request; the same for a repeated one.
        x_t: Noised latents [B, C, h, w].
        t: Integer timesteps [B].
        prompts: B prompts.
        with_graph: Whether gradients will flow back to x_t.

    Returns:
        One x0-prediction a call.
    """
    if not with_graph:
        with torch.no_grad():
            pending = [c.client.submit_forward(request_id, x_t, t, prompts, c.branch, False) for c in calls]
            return tuple(p.result() for p in pending)
    return _Denoise.apply(x_t, t, tuple(calls), request_id, tuple(prompts))


class _Denoise(torch.autograd.Function):
    """All denoisers of a step as one node of the learner's graph."""

    @staticmethod
    def forward(ctx: Any, x_t: Tensor, t: Tensor, calls: Any, request_id: str, prompts: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_t, t)
        ctx.request = (calls, request_id, prompts)
        plain = x_t.detach()
        pending = [c.client.submit_forward(request_id, plain, t, prompts, c.branch, True) for c in calls]
        return tuple(p.result() for p in pending)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        x_t, t = ctx.saved_tensors
        calls, request_id, prompts = ctx.request
        plain = x_t.detach()
        pending = [
            c.client.submit_vjp(request_id, plain, t, prompts, c.branch, g.detach())
            for c, g in zip(calls, cotangents, strict=True)
        ]
        gradient = pending[0].result()
        for other in pending[1:]:
            gradient = gradient + other.result()
        return gradient, None, None, None, None
