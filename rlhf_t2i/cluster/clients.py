"""Clients of remote roles: calls on Ray actors that split a batch over the servers and join the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import ray
import torch
from torch import Tensor

from rlhf_t2i.algorithm import rng
from rlhf_t2i.errors import ProcessLost, RunError, UsageError, first_line
from rlhf_t2i.roles.stopwatch import WAIT, stopwatch

STEP_TIMEOUT_KEY = "placement.step_timeout_s"
_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,  # Ray ends the largest process of a machine before the system does
    ray.exceptions.ObjectLostError,  # an answer that went with its node
    ray.exceptions.NodeDiedError,
)
_FULL = (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError)


class NoAnswer(RunError):
    """A call took longer than its limit."""


def partners(caller: int, callers: int, servers: int) -> list[int]:
    """The servers of one caller; of the two numbers one divides the other.

    More callers than servers: neighbors share one. More servers: each caller has a block of its own.
    """
    if callers >= servers:
        return [caller * servers // callers]
    block = servers // callers
    return list(range(caller * block, (caller + 1) * block))


@contextmanager
def translate_ray_errors(role: str, timeout_s: float | None = None, limit: str = STEP_TIMEOUT_KEY) -> Iterator[None]:
    """Turn what Ray raises while it sends to a role, or waits for it, into this project's own errors.

    Args:
        role: Who is called.
        timeout_s: How long it may take.
        limit: The key of the recipe that says so.

    Raises:
        ProcessLost: The role's process died and Ray may not restart it, or its answer was lost with its node.
        NoAnswer: The role took longer than ``timeout_s``.
        RunError: The role failed, or Ray's store and its disk are full.
    """
    try:
        yield
    except ray.exceptions.GetTimeoutError:
        raise NoAnswer(f"the {role} did not answer within {timeout_s:g} s ({limit})") from None
    except ray.exceptions.RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, ray.exceptions.RayTaskError) and cause.cause is not None:
            cause = cause.cause
        if isinstance(cause, RunError | UsageError):
            raise cause from None
        if isinstance(cause, _FULL):  # its answer could not be stored
            raise _store_full(role, cause) from error
        raise RunError(f"the {role} failed: {type(cause).__name__}: {cause}") from error
    except _LOST as error:
        raise ProcessLost(f"a process of the {role} died: {first_line(error)}") from error
    except _FULL as error:
        raise _store_full(role, error) from error
    except ray.exceptions.RayError as error:
        raise RunError(f"Ray failed while the {role} worked: {type(error).__name__}: {first_line(error)}") from error


def _store_full(role: str, error: BaseException) -> RunError:
    return RunError(
        f"Ray's object store is full, and so is the disk it spills to, while the {role} worked "
        f"({first_line(error)}): make room below /tmp/ray, or give Ray more shared memory"
    )


def get(references: Any, timeout_s: float | None, role: str, limit: str = STEP_TIMEOUT_KEY) -> Any:
    """``ray.get`` that raises this project's own errors, see :func:`translate_ray_errors`."""
    with translate_ray_errors(role, timeout_s, limit):
        return ray.get(references, timeout=timeout_s)


@dataclass
class RemoteFuture:
    """An answer on its way from one or several servers."""

    references: list[Any]
    join: Callable[[list[Any]], Any]
    timeout_s: float | None
    role: str
    limit: str

    def result(self) -> Any:
        """Wait for all parts and join them."""
        with stopwatch.span(WAIT):
            return self.join(get(self.references, self.timeout_s, self.role, self.limit))


@dataclass
class RemoteCalls:
    """The client of a role that lives in other processes.

    Attributes:
        role: The role's name there.
        servers: The actors this caller talks to.
        timeout_s: How long one answer may take; None waits for ever.
        limit: The key of the recipe that says so.
        device: Where answers are moved.
    """

    role: str
    servers: list[Any]
    timeout_s: float | None = None
    limit: str = STEP_TIMEOUT_KEY
    device: torch.device | None = None

    def submit_forward(
        self, request_id: str, x_t: Tensor, t: Tensor, prompts: Sequence[str], branch: str, graph: bool
    ) -> Any:
        """See :class:`rlhf_t2i.roles.denoiser.DenoiserClient`."""
        parts = [(request_id, x_t[s], t[s], list(prompts[s]), branch, graph) for s in self._slices(len(x_t))]
        return self._start(
            "forward", parts, lambda answers: self._join(answers, len(x_t), 1 if branch == "both" else 0)
        )

    def submit_vjp(
        self, request_id: str, x_t: Tensor, t: Tensor, prompts: Sequence[str], branch: str, cotangent: Tensor
    ) -> Any:
        """See :class:`rlhf_t2i.roles.denoiser.DenoiserClient`."""
        # ``both`` is stacked [2, B, ...]: its batch is the second dimension.
        parts = [
            (request_id, x_t[s], t[s], list(prompts[s]), branch, cotangent[:, s] if branch == "both" else cotangent[s])
            for s in self._slices(len(x_t))
        ]
        return self._start("vjp", parts, lambda answers: self._join(answers, len(x_t)))

    def submit_sample(self, prompts: Sequence[str], keys: Sequence[rng.Key], weights: str) -> Any:
        """See :class:`rlhf_t2i.roles.generator.GeneratorClient`."""
        parts = [(list(prompts[s]), list(keys[s]), weights) for s in self._slices(len(prompts))]
        return self._start("sample", parts, lambda answers: self._join(answers, len(prompts)))

    def submit_value_and_grad(self, latents: Tensor, prompts: Sequence[str]) -> Any:
        """See :class:`rlhf_t2i.roles.learner.RewardClient`."""
        parts = self._image_parts(latents, prompts)
        return self._start("value_and_grad", parts, lambda answers: self._join_gradients(answers, len(latents)))

    def submit_scores(self, latents: Tensor, prompts: Sequence[str]) -> Any:
        """Every reward's value."""
        parts = self._image_parts(latents, prompts)
        return self._start("score", parts, lambda answers: self._join_scores(answers, len(latents)))

    def submit_decode(self, latents: Tensor) -> Any:
        """Images in [0, 1]."""
        parts = [(latents[s],) for s in self._slices(len(latents))]
        return self._start("decode", parts, lambda answers: self._join(answers, len(latents)))

    def _image_parts(self, latents: Tensor, prompts: Sequence[str]) -> list[tuple[Any, ...]]:
        return [(latents[s], list(prompts[s])) for s in self._slices(len(latents))]

    def _slices(self, batch: int) -> list[slice]:
        """One contiguous share a server, the first ones larger by one where it does not divide.

        With fewer samples than servers the last sample is repeated and its extra answers dropped: under ZeRO-3 a call
        is collective, and a server left out would leave the others waiting for ever.
        """
        count = len(self.servers)
        if batch < count:
            return [slice(min(i, batch - 1), min(i, batch - 1) + 1) for i in range(count)]
        share, rest = divmod(batch, count)
        return [slice(a, b) for a, b in pairwise(i * share + min(i, rest) for i in range(count + 1))]

    def _start(self, method: str, parts: list[tuple[Any, ...]], join: Callable[[list[Any]], Any]) -> RemoteFuture:
        references = []
        for server, part in zip(self.servers, parts, strict=True):
            cpu = tuple(a.detach().cpu() if isinstance(a, Tensor) else a for a in part)
            stopwatch.bytes_sent += sum(a.numel() * a.element_size() for a in cpu if isinstance(a, Tensor))
            with translate_ray_errors(self.role):
                references.append(server.call.remote(self.role, method, *cpu))
        return RemoteFuture(references, join, self.timeout_s, self.role, self.limit)

    def _join(self, answers: list[Tensor], batch: int, dim: int = 0) -> Tensor:
        """The servers' answers as one batch, on the caller's device."""
        joined = torch.cat(answers, dim).narrow(dim, 0, batch)
        stopwatch.bytes_sent += joined.numel() * joined.element_size()
        return joined if self.device is None else joined.to(self.device)

    def _join_scores(self, answers: list[dict[str, Tensor]], batch: int) -> dict[str, Tensor]:
        return {label: self._join([answer[label] for answer in answers], batch) for label in answers[0]}

    def _join_gradients(
        self, answers: list[dict[str, tuple[Tensor, Tensor]]], batch: int
    ) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            label: (
                self._join([answer[label][0] for answer in answers], batch),
                self._join([answer[label][1] for answer in answers], batch),
            )
            for label in answers[0]
        }
