"""How the methods of roles are called from elsewhere: declared once, beside the method.

A method with :func:`batched` works on a batch: a client splits the call over the processes that serve the role and
joins their answers. A method without it is called on every rank of the role with the same arguments. Nothing else is
written for a method: the local and the Ray client read its declaration.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Method = Callable[Concatenate[Any, P], T]


class Future(Protocol[T_co]):
    """The result of a call that may still be running."""

    def result(self) -> T_co:
        """Wait for the result; raises what the call raised."""


class Client(Protocol):
    """Where a role is called: in this process or in others. The meaning of a call is the same."""

    @property
    def place(self) -> object:
        """Equal for clients whose calls wait for each other, because the same processes work on them."""

    def submit(self, method: Method[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start a :func:`batched` method of the role, given as a function (``RewardRole.score``)."""


@dataclass(frozen=True)
class Batched:
    """How a call on a batch is spread over the servers of a role.

    Attributes:
        names: The parameters with one item per sample. Each server gets its share of them, and the other arguments
            whole. Answers are joined along the first dimension of their tensors.
        collective: Under ZeRO-3 the method gathers weights from all ranks, so every server must take part in every
            call. With fewer samples than servers the last sample is repeated and its extra answers are dropped.
        concurrent: Whether a call in the caller's own process may run in a thread while the caller waits for other
            processes. It must not touch networks that the caller trains.
        timeout: Which limit of the client applies: ``step``, or ``reward`` for calls of reward plugins.
    """

    names: tuple[str, ...]
    collective: bool = False
    concurrent: bool = False
    timeout: Literal["step", "reward"] = "step"

    @classmethod
    def of(cls, method: Callable[..., object]) -> Batched:
        """The declaration of a method.

        Raises:
            TypeError: It has none.
        """
        found = getattr(method, "batched", None)
        if not isinstance(found, cls):
            raise TypeError(f"{method.__qualname__} is not declared with @batched")
        return found


def batched(
    *names: str, collective: bool = False, concurrent: bool = False, timeout: Literal["step", "reward"] = "step"
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Declare a role's method that works on a batch; arguments as in :class:`Batched`."""

    def declare(method: Callable[P, T]) -> Callable[P, T]:
        method.batched = Batched(names, collective, concurrent, timeout)  # type: ignore[attr-defined]
        return method

    return declare


def bind(method: Callable[..., object], *args: object, **kwargs: object) -> dict[str, Any]:
    """All arguments of a role's method by name, defaults included."""
    bound = inspect.signature(method).bind(None, *args, **kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])  # without self


def split(
    method: Callable[..., object], servers: int, *args: object, **kwargs: object
) -> tuple[list[tuple[object, ...]], int]:
    """Arguments of the call for each server, and the number of samples.

    The shares are contiguous and in order; the first ones are larger by one where the batch does not divide. Servers
    of a method that is not collective get no call when there are fewer samples than servers.
    """
    declared, arguments = Batched.of(method), bind(method, *args, **kwargs)
    batch = len(arguments[declared.names[0]])
    return [
        tuple(value[share] if name in declared.names else value for name, value in arguments.items())
        for share in _shares(batch, servers, declared.collective)
    ], batch


def _shares(batch: int, servers: int, collective: bool) -> list[slice]:
    if batch < servers and collective:
        return [slice(min(i, batch - 1), min(i, batch - 1) + 1) for i in range(servers)]
    servers = max(1, min(batch, servers))
    share, rest = divmod(batch, servers)
    return [slice(a, b) for a, b in pairwise(i * share + min(i, rest) for i in range(servers + 1))]


def join(answers: Sequence[T], batch: int) -> T:
    """The servers' answers as one: tensors, or dictionaries and tuples of them, concatenated along the batch."""
    first: Any = answers[0]
    parts: Any = answers
    joined: Any
    if isinstance(first, Tensor):
        joined = torch.cat(parts).narrow(0, 0, batch)
    elif isinstance(first, dict):
        joined = {key: join([part[key] for part in parts], batch) for key in first}
    else:
        joined = tuple(join(items, batch) for items in zip(*parts, strict=True))
    return cast(T, joined)
