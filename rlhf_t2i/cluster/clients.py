"""Clients of remote roles: calls on Ray actors that split a batch over the servers and join the answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Generic

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rlhf_t2i.cluster.base import STEP_TIMEOUT_KEY
from rlhf_t2i.errors import ProcessLost, RunError, UsageError, first_line
from rlhf_t2i.roles import dispatch
from rlhf_t2i.roles.dispatch import Batched, Future, Method, P, T
from rlhf_t2i.roles.stopwatch import WAIT, stopwatch
from rlhf_t2i.utils.device import move

_CPU = torch.device("cpu")
_CHECK_EVERY_S = 5.0
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
    """Indices of the servers that one caller calls; ``callers`` divides ``servers`` or the reverse.

    More callers than servers: neighbors share one. More servers: each caller has a block of its own.
    """
    if callers >= servers:
        return [caller * servers // callers]
    block = servers // callers
    return list(range(caller * block, (caller + 1) * block))


@contextmanager
def translate_ray_errors(role: str, limit: Limit | None = None) -> Iterator[None]:
    """Turn what Ray raises while it sends to a role, or waits for it, into this project's own errors.

    Args:
        role: The role that is called.
        limit: How long it may take.

    Raises:
        ProcessLost: The role's process died and Ray may not restart it, or its answer was lost with its node.
        NoAnswer: The role took longer than ``limit``.
        RunError: The role failed, or Ray's store and its disk are full.
    """
    try:
        yield
    except ray.exceptions.GetTimeoutError:
        assert limit is not None
        raise NoAnswer(f"the {role} did not answer within {limit.seconds:g} s ({limit.key})") from None
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
        raise ProcessLost(f"a process of the {role} died: {how_it_died(error)}") from error
    except _FULL as error:
        raise _store_full(role, error) from error
    except ray.exceptions.RayError as error:
        raise RunError(f"Ray failed while the {role} worked: {type(error).__name__}: {first_line(error)}") from error


def how_it_died(error: BaseException) -> str:
    """How a process died. Ray does not learn its signal, and lists what it may have been over a dozen lines."""
    first = first_line(error)
    if isinstance(error, ray.exceptions.ActorUnavailableError) or first.startswith("The actor died unexpectedly"):
        return "killed from outside, most often by the kernel for lack of memory, or crashed in native code"
    return first


def _store_full(role: str, error: BaseException) -> RunError:
    return RunError(
        f"Ray's object store is full, and so is the disk it spills to, while the {role} worked "
        f"({first_line(error)}): make room in its temporary folder (TMPDIR), or give Ray more shared memory"
    )


@dataclass(frozen=True)
class Limit:
    """How long an answer may take (None: no limit), and the key of the recipe that says so."""

    seconds: float | None = None
    key: str = STEP_TIMEOUT_KEY


Check = Callable[..., None]
"""Raises where it is useless to wait, or to send (``sending`` bytes); see :meth:`RayMonitor.check`."""


def do_nothing(sending: int = 0) -> None:
    """The check of clients in actors: their caller watches Ray."""


def get(references: Sequence[ObjectRef], limit: Limit, role: str, check: Check = do_nothing) -> list[object]:
    """``ray.get`` that raises this project's own errors, see :func:`translate_ray_errors`.

    Args:
        references: Of the answers.
        limit: How long they may take.
        role: Who answers.
        check: Called first and every 5 s; raises where waiting is useless.
    """
    deadline = math.inf if limit.seconds is None else time.monotonic() + limit.seconds
    with translate_ray_errors(role, limit):
        while True:
            check()
            remaining = deadline - time.monotonic()
            try:
                return ray.get(references, timeout=max(0.0, min(remaining, _CHECK_EVERY_S)))
            except ray.exceptions.GetTimeoutError:
                if remaining <= _CHECK_EVERY_S:
                    raise


@dataclass
class RemoteFuture(Generic[T]):
    """An answer on its way from one or several servers."""

    client: RemoteClient
    references: Sequence[ObjectRef]
    limit: Limit
    join: Callable[..., T]

    def result(self) -> T:
        """Wait for all parts and join them."""
        with stopwatch.span(WAIT), self.client.guard(self.client.role):
            answers = get(self.references, self.limit, self.client.role, self.client.check)
        return self.join(answers)


@dataclass
class First(Generic[T]):
    """The answer of the only server."""

    answers: Future[list[T]]

    def result(self) -> T:
        """Wait for it."""
        return self.answers.result()[0]


@dataclass
class RemoteClient:
    """The client of a role that lives in other processes.

    Attributes:
        role: The role's name there.
        servers: The actors this caller talks to.
        limit: For one answer.
        reward_limit: For one answer of a method that calls reward plugins.
        device: Where answers are moved.
        guard: Opened around every wait with the role's name; turns errors into others.
        check: See :func:`get`; also called before something is sent.
    """

    role: str
    servers: list[ActorHandle]
    limit: Limit = Limit()
    reward_limit: Limit = Limit()
    device: torch.device | None = None
    guard: Callable[[str], AbstractContextManager[object]] = nullcontext
    check: Check = do_nothing

    @property
    def place(self) -> object:
        """See :class:`rlhf_t2i.roles.dispatch.Client`."""
        return self.servers

    def submit(self, method: Method[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Split the batch over the servers; see :class:`rlhf_t2i.roles.dispatch.Client`."""
        parts, batch = dispatch.split(method, len(self.servers), *args, **kwargs)
        references = []
        with translate_ray_errors(self.role):
            for server, part in zip(self.servers, parts, strict=False):
                cpu = move(part, _CPU)
                self.check(size := _bytes(cpu))
                stopwatch.bytes_sent += size
                references.append(server.call.remote(self.role, method.__name__, *cpu))
        limit = self.reward_limit if Batched.of(method).timeout == "reward" else self.limit
        return RemoteFuture(self, references, limit, lambda answers: self._join(answers, batch))

    def submit_all(self, method: Method[P, T], arguments: Sequence[object]) -> Future[list[T]]:
        """Call a method with the same arguments on every server; answers in their order."""
        self.check(_bytes(arguments))
        with translate_ray_errors(self.role):
            references = [server.call.remote(self.role, method.__name__, *arguments) for server in self.servers]
        return RemoteFuture(self, references, self.limit, list)

    def _join(self, answers: list[T], batch: int) -> T:
        """The servers' answers as one batch, on the caller's device."""
        joined = dispatch.join(answers, batch)
        stopwatch.bytes_sent += _bytes(joined)
        return joined if self.device is None else move(joined, self.device)


def _bytes(value: object) -> int:
    """Of all tensors in a value."""
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
