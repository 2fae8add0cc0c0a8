"""Calls of roles in the same process, and how they overlap with calls of roles elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from rlhf_t2i.roles.dispatch import Batched, Future, Method, P
from rlhf_t2i.roles.stopwatch import WAIT, stopwatch

T = TypeVar("T")


@dataclass
class Deferred(Generic[T]):
    """A call in this process, made when its result is asked for."""

    call: Callable[[], T]

    def result(self) -> T:
        """Make the call."""
        return self.call()


@dataclass
class Done(Generic[T]):
    """A call that was made."""

    value: T

    def result(self) -> T:
        """Its result."""
        return self.value


def run_local(futures: Sequence[Future[T]]) -> list[Future[T]]:
    """Make the calls of this process now, in order, while other processes work on theirs."""
    return [Done(future.result()) if isinstance(future, Deferred) else future for future in futures]


def gather(futures: Sequence[Future[T]]) -> list[T]:
    """Results in the order of ``futures``; calls in this process run first, while other processes work on theirs."""
    return [future.result() for future in run_local(futures)]


class Background:
    """One thread for the concurrent calls of a process: they run one after another, in order."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "background")

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Start a call as soon as those before it are done."""
        return _Running(self._thread.submit(call))

    def wait(self) -> None:
        """Wait until the thread is idle."""
        self.submit(lambda: None).result()


@dataclass
class _Running(Generic[T]):
    """A call that runs in the background thread."""

    future: Future[T]

    def result(self) -> T:
        with stopwatch.span(WAIT):
            return self.future.result()


@dataclass
class LocalClient:
    """The client of a role in the same process.

    Attributes:
        role: The role's name, for the timings.
        target: The role.
        background: Where concurrent methods run; None: every call is made when its result is asked for.
    """

    role: str
    target: Any = field(repr=False)
    background: Background | None = None

    @property
    def place(self) -> object:
        """See :class:`Client`."""
        return "here"

    def submit(self, method: Method[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See :class:`Client`."""

        def call() -> T:
            with stopwatch.span(self.role):
                return cast(T, getattr(self.target, method.__name__)(*args, **kwargs))

        if self.background is None:
            return Deferred(call)
        if Batched.of(method).concurrent:
            return self.background.submit(call)
        return Deferred(lambda: self._after_background(call))

    def _after_background(self, call: Callable[[], T]) -> T:
        """Two calls at once would share one device: no faster, and their peaks of memory would add up."""
        assert self.background is not None
        self.background.wait()
        return call()
