"""A discrete simulation of calls on groups of devices: when each call starts and ends, and who waits meanwhile.

The devices of a group do the same at the same time, so that one timeline stands for all of them.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["compute", "communication"]
Pace = Callable[[Sequence[str]], float]
"""How many times as long calls take while the devices of these groups compute at once."""


@dataclass(frozen=True)
class Call:
    """One call of a step.

    Attributes:
        name: Unique in a step.
        role: Whose work it is.
        group: Whose devices it occupies; None: no device, only time passes.
        seconds: It takes on them.
        after: Names of the calls that end before it starts.
        kind: Whether its devices compute or exchange data.
        link: Whether it occupies the group's links instead of its devices, which compute meanwhile.
    """

    name: str
    role: str
    group: str | None
    seconds: float
    after: tuple[str, ...] = ()
    kind: Kind = "compute"
    link: bool = False

    @property
    def computes(self) -> bool:
        """Whether its devices compute."""
        return self.group is not None and self.kind == "compute"


@dataclass(frozen=True)
class Span:
    """A call and when it ran, in seconds from the start of the step."""

    call: Call
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it ran; longer than alone where devices slow each other down."""
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """Result of :func:`simulate`: the calls by their start."""

    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""
        return max((span.end for span in self.spans), default=0.0)

    @property
    def groups(self) -> list[str]:
        """Groups that a call occupies."""
        return list(dict.fromkeys(span.call.group for span in self.spans if span.call.group is not None))

    def busy(self, kind: Kind = "compute") -> Mapping[tuple[str, str], float]:
        """Seconds by (group, role) that a group's devices compute, or exchange data instead of computing."""
        found: defaultdict[tuple[str, str], float] = defaultdict(float)
        for span in self.spans:
            if span.call.group is not None and not span.call.link and span.call.kind == kind:
                found[span.call.group, span.call.role] += span.seconds
        return found

    def idle(self) -> Mapping[str, float]:
        """Share of the step, by group, in which its devices neither compute nor exchange data."""
        worked: defaultdict[str, float] = defaultdict(float)
        for kind in ("compute", "communication"):
            for (group, _), seconds in self.busy(kind).items():
                worked[group] += seconds
        return {group: 1 - worked[group] / self.seconds if self.seconds else 0.0 for group in self.groups}


def simulate(calls: Sequence[Call], pace: Pace = lambda groups: 1.0) -> Timeline:
    """Run calls as early as they can.

    A device does one call at a time and to its end. Of several that could start it takes the one that is listed first.

    Args:
        calls: In order of precedence.
        pace: How devices slow each other down.

    Raises:
        ValueError: A name is given twice, a call waits for an unknown one, or calls wait for each other.
    """
    known = {call.name: number for number, call in enumerate(calls)}
    if len(known) < len(calls):
        raise ValueError("two calls have one name")
    waiting = {number: len(set(call.after)) for number, call in enumerate(calls)}
    followers: defaultdict[int, list[int]] = defaultdict(list)
    for number, call in enumerate(calls):
        for name in set(call.after):
            if name not in known:
                raise ValueError(f"{call.name!r} waits for {name!r}, which is no call")
            followers[known[name]].append(number)
    run = _Run(calls, pace)
    for number in (number for number, count in waiting.items() if not count):
        run.ready(number)
    spans = []
    for number, start, end in run.events():
        spans.append(Span(calls[number], start, end))
        for follower in followers[number]:
            waiting[follower] -= 1
            if not waiting[follower]:
                run.ready(follower)
    if len(spans) < len(calls):
        stuck = next(calls[number].name for number, count in waiting.items() if count)
        raise ValueError(f"{stuck!r} waits for itself")
    return Timeline(tuple(sorted(spans, key=lambda span: (span.start, known[span.call.name]))))


class _Run:
    """The clock, what each device does now, and what waits for it."""

    def __init__(self, calls: Sequence[Call], pace: Pace) -> None:
        self._calls, self._now = calls, 0.0
        self._pace, self._factor = pace, 1.0
        self._began: dict[int, float] = {}
        self._ends: dict[int, float] = {}  # of what runs now
        self._queues: defaultdict[tuple[str, bool], list[int]] = defaultdict(list)
        self._occupied: set[tuple[str | None, bool]] = set()

    def ready(self, number: int) -> None:
        """A call may start."""
        call = self._calls[number]
        if call.group is None:
            self._began[number], self._ends[number] = self._now, self._now + call.seconds
        else:
            heapq.heappush(self._queues[call.group, call.link], number)

    def events(self) -> Iterator[tuple[int, float, float]]:
        """(call, start, end) of every call when it ends; whoever asks makes others ready meanwhile."""
        self._start()
        while self._ends:
            self._now = min(self._ends.values())
            for number in sorted(n for n, end in self._ends.items() if end == self._now):  # before anything starts
                del self._ends[number]
                self._occupied.discard((self._calls[number].group, self._calls[number].link))
                yield number, self._began[number], self._now
            self._start()

    def _start(self) -> None:
        for device, queue in self._queues.items():
            if queue and device not in self._occupied:
                number = heapq.heappop(queue)
                factor = self._factor if self._calls[number].computes else 1.0
                self._began[number], self._ends[number] = self._now, self._now + factor * self._calls[number].seconds
                self._occupied.add(device)
        self._keep_pace()

    def _keep_pace(self) -> None:
        """Stretch what is left of the calls that compute, as many as compute now."""
        computing = [number for number in self._ends if self._calls[number].computes]
        factor = self._pace([self._calls[number].group or "" for number in computing])
        if factor != self._factor:
            for number in computing:
                self._ends[number] = self._now + (self._ends[number] - self._now) * factor / self._factor
            self._factor = factor


def without_communication(calls: Sequence[Call]) -> list[Call]:
    """The same calls where exchanging data takes no time."""
    return [replace(call, seconds=0.0) if call.kind == "communication" else call for call in calls]
