"""Denoisers behind futures: a divergence never learns where the networks live.

A denoiser serves two stateless calls: ``forward`` gives an x0-prediction, ``vjp`` the vector-Jacobian product with
respect to x_t. The graph kept between them is only a cache, keyed by a request_id: where it was lost (a restart, an
eviction) ``vjp`` recomputes it from its arguments, so every call may be repeated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf_t2i.roles.dispatch import Client, Future, batched
from rlhf_t2i.roles.local_calls import gather

Branch = Literal["conditional", "guided", "both"]
"""``conditional``: with the prompt. ``guided``: classifier-free guidance. ``both``: [B, 2, ...], with and without the
prompt; only the first carries a gradient."""


class DenoiserServer:
    """The server side: predictions with a graph kept for the product that usually follows.

    Args:
        predict: ``(x_t, t, prompts, branch) -> x0-prediction``, differentiable in x_t.
        callers: Processes that call this one. Each has one request at a time, so this many graphs are kept.
        serving: Opened around predictions with a graph and around their products.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, Tensor, Sequence[str], Branch], Tensor],
        callers: int = 1,
        serving: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._predict, self._callers, self._serving = predict, callers, serving
        self._graphs: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    @batched("x_t", "t", "prompts", collective=True)
    def forward(
        self, request_id: str, x_t: Tensor, t: Tensor, prompts: Sequence[str], branch: Branch, keep_graph: bool
    ) -> Tensor:
        """The x0-prediction, detached."""
        if not keep_graph:
            with torch.no_grad():
                return self._predict(x_t, t, prompts, branch)
        output = self._remember(request_id, x_t, t, prompts, branch)[1]
        return output.detach()

    @batched("x_t", "t", "prompts", "cotangent", collective=True)
    def vjp(
        self, request_id: str, x_t: Tensor, t: Tensor, prompts: Sequence[str], branch: Branch, cotangent: Tensor
    ) -> Tensor:
        """``cotangent^T d prediction / d x_t``; parameters collect no gradient."""
        entry = self._graphs.pop(request_id, None)
        if entry is None:
            self._remember(request_id, x_t, t, prompts, branch)
            entry = self._graphs.pop(request_id)
        leaf, output = entry
        with self._serving():  # recomputed activations run forward once more
            (gradient,) = torch.autograd.grad(output, leaf, cotangent.to(output.dtype))
        return gradient

    def _remember(
        self, request_id: str, x_t: Tensor, t: Tensor, prompts: Sequence[str], branch: Branch
    ) -> tuple[Tensor, Tensor]:
        leaf = x_t.detach().requires_grad_(True)
        with torch.enable_grad(), self._serving():
            output = self._predict(leaf, t, prompts, branch)
        self._graphs[request_id] = (leaf, output)
        while len(self._graphs) > self._callers:
            self._graphs.popitem(last=False)
        return leaf, output


@dataclass(frozen=True)
class DenoiserCall:
    """One denoiser of a step and the branch that it predicts."""

    client: Client
    branch: Branch

    def forward(
        self, request_id: str, x_t: Tensor, t: Tensor, prompts: Sequence[str], *, keep_graph: bool
    ) -> Future[Tensor]:
        """Start :meth:`DenoiserServer.forward`."""
        return self.client.submit(DenoiserServer.forward, request_id, x_t, t, prompts, self.branch, keep_graph)

    def vjp(self, request_id: str, x_t: Tensor, t: Tensor, prompts: Sequence[str], cotangent: Tensor) -> Future[Tensor]:
        """Start :meth:`DenoiserServer.vjp`."""
        return self.client.submit(DenoiserServer.vjp, request_id, x_t, t, prompts, self.branch, cotangent)


class Denoising:
    """One request to all denoisers of a step: their forwards, and then their products, run side by side.

    The forwards start here; calls in this process are made when their results are asked for.

    Args:
        calls: Which denoisers.
        request_id: Names this request; the same for a repeated one.
        x_t: Noised latents [B, C, h, w], without a graph.
        t: Integer timesteps [B].
        prompts: B prompts.
        with_graph: Whether products will be asked for.
    """

    def __init__(
        self,
        calls: Sequence[DenoiserCall],
        request_id: str,
        x_t: Tensor,
        t: Tensor,
        prompts: Sequence[str],
        with_graph: bool,
    ) -> None:
        self._calls, self._request = calls, (request_id, x_t, t, prompts)
        self._forwards = [call.forward(*self._request, keep_graph=with_graph) for call in calls]

    def predictions(self) -> list[Tensor]:
        """One detached x0-prediction per call."""
        return gather(self._forwards)

    def submit_products(self, cotangents: Sequence[Tensor]) -> list[Future[Tensor]]:
        """Start every denoiser's vector-Jacobian product with the gradient at its prediction; see :func:`pull_back`."""
        return [c.vjp(*self._request, g) for c, g in zip(self._calls, cotangents, strict=True)]


def pull_back(products: Sequence[Future[Tensor]]) -> Tensor:
    """The gradient at x_t [B, C, h, w]: the sum of the products, in the order of the calls."""
    gradient, *others = gather(products)
    for other in others:
        gradient = gradient + other
    return gradient
