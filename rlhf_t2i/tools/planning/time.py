"""Seconds per step: how long each call takes on a device, put on the graph of a step and simulated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from rlhf_t2i.plugins import traits
from rlhf_t2i.plugins.online import Schedule
from rlhf_t2i.recipe.placement import batch_geometry
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning import graph, simulation, zero
from rlhf_t2i.tools.planning.graph import Lesson, Rules, Shape, Trained
from rlhf_t2i.tools.planning.memory import zero_setting
from rlhf_t2i.tools.planning.simulation import Kind, Timeline
from rlhf_t2i.tools.planning.speed import Speed

if TYPE_CHECKING:
    from rlhf_t2i.families.flops import Work
    from rlhf_t2i.families.footprints import Footprints

Placed = Mapping[str, tuple[str, int]]

_PACKED = 1e9
"""Assumed bytes per second of weights as bytes through Ray's object store: copied into it and out of it, in parts."""
_HOP = 3e-3
"""Assumed seconds of a call of an actor, or of its answer: copies between device and host, Ray, a pickle of latents."""
_EMA_BYTES = 12
"""Per number of a sharded moving average: the average and the masters are read, the average is written."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step and what its devices do meanwhile.

    Attributes:
        timeline: Every call with its start and end.
        update: Of one assistant update alone.
        without_communication: The step's seconds if exchanging data took no time.
        image: To draw, decode and score one image between steps, on all devices that do so.
        lessons: Of the lessons of rewards that learn, before the first generator update.
    """

    timeline: Timeline
    update: Timeline
    without_communication: float
    image: float
    lessons: float = 0.0

    @property
    def step(self) -> float:
        """Everything."""
        return self.timeline.seconds

    @property
    def assistant_update(self) -> float:
        """Of one assistant update alone."""
        return self.update.seconds

    @cached_property
    def assistant(self) -> float:
        """Until the last assistant update of a step ends."""
        return max((s.end for s in self.timeline.spans if s.call.name.startswith("assistant")), default=0.0)

    @property
    def generator(self) -> float:
        """Of the generator update, which follows."""
        return self.step - self.assistant

    @property
    def exposed(self) -> float:
        """Seconds that the step would be shorter if exchanging data took no time."""
        return self.step - self.without_communication

    @property
    def idle(self) -> Mapping[str, float]:
        """Share of the step, by group, in which its devices wait for others."""
        return self.timeline.idle()

    def roles(self, phase: str) -> dict[str, float]:
        """What each role computes in the ``assistant`` or ``generator`` updates, on one of its devices."""
        return self._sums(phase, "compute", lambda call: call.role)

    def communication(self, phase: str) -> dict[str, float]:
        """What is exchanged there, by name; not all of it makes the step longer."""

        def label(call: simulation.Call) -> str:
            return call.role if call.role == graph.HOP else f"{call.role}: {call.name.rpartition(': ')[2]}"

        return self._sums(phase, "communication", label)

    def _sums(self, phase: str, kind: Kind, label: Callable[[simulation.Call], str]) -> dict[str, float]:
        found: dict[str, float] = {}
        for span in self.timeline.spans:
            if span.call.name.startswith(phase) and span.call.kind == kind:
                name = label(span.call)
                found[name] = found.get(name, 0.0) + span.seconds
        return found


def estimate(recipe: Recipe, placed: Placed, networks: Footprints, speed: Speed, rules: Rules = graph.NOW) -> StepTime:
    """Estimate a step.

    Args:
        recipe: The recipe.
        placed: (group, devices) of every role.
        networks: Of the recipe.
        speed: Of every device.
        rules: Which calls overlap.
    """
    rules = rules.under(recipe.optimization.zero_stage)
    shape = _Shaper(recipe, placed, networks, speed, rules)
    made = shape.shape()
    calls = graph.step(made, rules)
    devices = dict(placed.values())

    def pace(groups: Sequence[str]) -> float:
        return speed.crowding(sum(devices[group] for group in groups))

    return StepTime(
        simulation.simulate(calls, pace),
        simulation.simulate(graph.assistant_update(made, rules), pace),
        simulation.simulate(simulation.without_communication(calls), pace).seconds,
        shape.image(),
        sum(schedule.warmup * (lesson.draw + lesson.learn) for schedule, lesson in shape.lessons()),
    )


@dataclass(frozen=True)
class _Calls:
    """So many calls of a process, of so many images each."""

    count: int
    images: int


@dataclass(frozen=True)
class _Shaper:
    recipe: Recipe
    placed: Placed
    networks: Footprints
    speed: Speed
    rules: Rules

    def shape(self) -> Shape:
        """How long each call of a step takes."""
        from rlhf_t2i.families import flops

        recipe = self.recipe
        groups = {role: self.placed[role][0] for role in ("learner", "generator", "assistant", "reference")}
        (generator, assistant), works = flops.assistant_step(recipe), flops.generator_step(recipe)
        own = {work.role: work for work in works}
        predict, product = {}, {}
        for role in ("assistant", "reference"):
            # Both branches of guidance are one batch.
            branches = round(own[role].forwards) if role == "reference" else 1
            calls = self._served(role, "learner")
            predict[role], product[role] = self._seconds(own[role], calls, branches)
        draw, backward = self._seconds(own["learner"], _Calls(1, self._micro("learner")))
        return Shape(
            groups=groups,
            assistant=self._trained("assistant"),
            learner=self._trained("learner"),
            rounds=recipe.algorithm.assistant_steps,
            sample=sum(self._seconds(generator, self._served("generator", "assistant"))),
            train=sum(self._seconds(assistant, _Calls(1, self._micro("assistant")))),
            draw=draw,
            backward=backward,
            predict=predict,
            product=product,
            score=self._scores(works),
            encode=(self._encode("assistant", ("generator", "assistant")), self._encode("learner", groups)),
            hop=_HOP if recipe.placement.mode == "ray" else 0.0,
            lessons=[lesson for _, lesson in self.lessons()],
        )

    def lessons(self) -> Iterator[tuple[Schedule, Lesson]]:
        """Of every reward that learns: fresh samples are drawn, decoded and shown to its network."""
        from rlhf_t2i.families import flops

        sizes = {choice.key: choice.micro_batch for choice in self.recipe.algorithm.rewards}
        for key, schedule in traits.resolve(self.recipe).online.items():
            drawing, *rest = flops.lesson(self.recipe, key)
            servers = self._devices(self.placed["generator"][0])
            draw = sum(self._seconds(drawing, _Calls(1, math.ceil(schedule.images / servers))))
            if self.recipe.models.embeddings is None:
                draw += self.speed.encode(math.ceil(schedule.prompts / servers))
            images = min(schedule.images, sizes[key] or schedule.images)
            calls = _Calls(math.ceil(schedule.images / images), images)
            learn = sum(sum(self._seconds(work, calls)) for work in rest)
            yield schedule, Lesson(f"reward:{key}", self.placed[f"reward:{key}"][0], draw, learn)

    def image(self) -> float:
        """Seconds of an image between steps."""
        from rlhf_t2i.families import flops

        total = 0.0
        for group, work in _located(flops.measuring(self.recipe), self.placed):
            devices = self._devices(group)
            images = -(-self.recipe.evaluation.batch_size // devices)
            total += sum(self._seconds(work, _Calls(1, images))) / (images * devices)
        return total

    def _micro(self, role: str) -> int:
        settings = self.recipe.optimization
        return batch_geometry(settings.batch_size, self.placed[role][1], settings.micro_batch, role)[0]

    def _devices(self, group: str) -> int:
        return next(devices for name, devices in self.placed.values() if name == group)

    def _served(self, role: str, caller: str) -> _Calls:
        """The calls of one of a role's processes for a micro-batch of all the caller's ranks."""
        return self._in_group(self._devices(self.placed[role][0]), caller)

    def _in_group(self, servers: int, caller: str) -> _Calls:
        ranks, micro = self.placed[caller][1], self._micro(caller)
        if ranks >= servers:
            return _Calls(ranks // servers, micro)
        return _Calls(1, -(-micro * ranks // servers))

    def _seconds(self, work: Work, calls: _Calls, branches: int = 1) -> tuple[float, float]:
        """Seconds of forwards, and of gradients; ``branches`` of the forwards are one batch."""
        from rlhf_t2i.families import flops

        passes = self.speed.passes(work.part, calls.images * branches)
        again = self.recipe.optimization.checkpoints(work.role if work.part == flops.NETWORK else "reward")
        back = work.backwards * (passes.inputs + (passes.forward if again else 0.0)) + work.weights * passes.weights
        return calls.count * work.forwards * passes.forward / branches, calls.count * back / branches

    def _scores(self, works: Sequence[Work]) -> dict[str, list[tuple[str, float]]]:
        """By group, decoder and rewards; a reward's own micro-batch bounds what is decoded at once."""
        found: dict[str, list[tuple[str, float]]] = {}
        sizes = {f"reward:{choice.key}": choice.micro_batch for choice in self.recipe.algorithm.rewards}
        for group, work in _located([w for w in works if w.role not in self.placed or w.role in sizes], self.placed):
            calls = self._in_group(self._devices(group), "learner")
            own = [sizes[role] for role, (name, _) in self.placed.items() if name == group and role in sizes]
            images = min([calls.images, *(size for size in own if size)])
            several = _Calls(calls.count * math.ceil(calls.images / images), images)
            found.setdefault(group, []).append((work.role, sum(self._seconds(work, several))))
        return found

    def _encode(self, caller: str, roles: Sequence[str] | Mapping[str, str]) -> dict[str, float]:
        """By group, encoding a micro-batch's prompts once; nothing where their embeddings are on disk."""
        if self.recipe.models.embeddings is not None:
            return {}
        found = {}
        for group in {self.placed[role][0] for role in roles}:
            calls = self._in_group(self._devices(group), caller)
            found[group] = self.speed.encode(calls.count * calls.images)
        return found

    def _trained(self, role: str) -> Trained:
        """What an update needs besides its passes."""
        recipe, settings = self.recipe, self.recipe.optimization
        optimizer = settings.generator if role == "learner" else settings.assistant
        setting = zero_setting(recipe, self.placed[role][1])
        _, micro_batches = batch_geometry(settings.batch_size, setting.ranks, settings.micro_batch, role)
        sizes = zero.sizes_of(self.networks.network(optimizer.lora).sizes())
        sent = zero.collectives(sizes, setting, micro_batches)

        def seconds(every: bool, overlaps: bool) -> float:
            items = [item for item in sent if (item.every, item.overlaps) == (every, overlaps)]
            total = sum(self.speed.links.seconds(item.bytes, setting.ranks) for item in items)
            return total / micro_batches if every else total

        share = -(-sizes.total // setting.ranks) if setting.stage else sizes.total
        finish: list[tuple[str, Kind, float]] = [
            ("reduce", "communication", seconds(False, False)),
            ("update", "compute", self.speed.update(share, setting)),
        ]
        if role == "learner":
            finish += self._copies(share)
        return Trained(micro_batches, seconds(True, False), seconds(True, True), finish)

    def _copies(self, share: int) -> Iterator[tuple[str, Kind, float]]:
        """The moving average, and weights to a generator in another group."""
        numbers, recipe = self.networks.network().parameters(), self.recipe
        if recipe.optimization.ema is not None:
            yield "moving average", "compute", self.speed.copy(_EMA_BYTES * share)
        if self.placed["generator"][0] != self.placed["learner"][0]:
            width = zero.BYTES[recipe.optimization.precision]
            yield "weights to the generator", "communication", width * numbers / _PACKED


def _located(works: Sequence[Work], placed: Placed) -> Iterator[tuple[str, Work]]:
    """(group, work); every group that holds rewards decodes for them."""
    for work in works:
        if work.role != "decoder":
            yield placed[work.role][0], work
            continue
        scored = [placed[other.role][0] for other in works if other.role.startswith("reward:")]
        for group in dict.fromkeys(scored):
            yield group, replace(work, backwards=work.backwards * scored.count(group) / len(scored))
