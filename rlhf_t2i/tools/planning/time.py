"""Seconds per step, estimated from counted FLOPs and a device's rates; without optimizers and text encoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlhf_t2i.recipe.placement import batch_geometry
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning import zero
from rlhf_t2i.tools.planning.devices import Rates
from rlhf_t2i.tools.planning.memory import zero_setting

if TYPE_CHECKING:
    from rlhf_t2i.families.flops import Work
    from rlhf_t2i.families.footprints import Footprints

Placed = Mapping[str, tuple[str, int]]

_STORE = 70e6
"""Bytes per second of float32 weights through Ray's object store to a generator elsewhere; from a run on two cores."""
_PAGEABLE = 5e9
"""Assumed bytes per second from a device to pageable host memory: the moving average is updated there."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a generator update with its assistant updates.

    Attributes:
        generator: Of the generator update's computation.
        assistant: Of the computation of all assistant updates of a step.
        generator_roles: What each role computes in the generator update, on one of its devices.
        assistant_roles: The same in the assistant updates.
        communication: What is waited for besides, by name: reductions, weights, the moving average.
        assistant_update: Of one assistant update alone, with its reductions.
        image: To draw, decode and score one image between steps, on all devices that do so.
    """

    generator: float
    assistant: float
    generator_roles: Mapping[str, float]
    assistant_roles: Mapping[str, float]
    communication: Mapping[str, float]
    assistant_update: float
    image: float

    @property
    def step(self) -> float:
        """Everything."""
        return self.generator + self.assistant + sum(self.communication.values())


def estimate(recipe: Recipe, placed: Placed, networks: Footprints, rates: Rates) -> StepTime:
    """Estimate a step.

    Args:
        recipe: The recipe.
        placed: (group, devices) of every role.
        networks: Of the recipe.
        rates: Of every device.
    """
    from rlhf_t2i.families import flops

    counted = flops.forwards(recipe)

    def seconds(works: Iterable[Work], images: float) -> list[tuple[str, str, float]]:
        """(role, group, seconds) of works on ``images``."""
        found = []
        for group, work in _located(works, placed):
            rate = rates.decoder if work.part == flops.DECODER else rates.network
            again = recipe.optimization.checkpoints(work.role if work.part == flops.NETWORK else "reward")
            ranks = next(devices for name, devices in placed.values() if name == group)
            found.append((work.role, group, images * work.flops(counted[work.part], again) / (ranks * rate)))
        return found

    batch, rounds = recipe.optimization.batch_size, recipe.algorithm.assistant_steps
    made = seconds(flops.generator_step(recipe), batch)
    generator = _sums((role, value) for role, _, value in made)
    beside = _sums((group, value) for role, group, value in made if role != "learner")
    update = _sums((role, value) for role, _, value in seconds(flops.assistant_step(recipe), batch))
    reductions = {
        role: _reductions(recipe, placed, networks, rates, role, busy)
        for role, busy in (("learner", generator["learner"]), ("assistant", update["assistant"]))
    }
    communication = {
        "reductions: learner": reductions["learner"],
        "reductions: assistant": rounds * reductions["assistant"],
        **_copies(recipe, placed, networks),
    }
    return StepTime(
        generator=generator["learner"] + overlapped(beside),
        assistant=rounds * sum(update.values()),
        generator_roles=generator,
        assistant_roles={role: rounds * value for role, value in update.items()},
        communication={name: value for name, value in communication.items() if value},
        assistant_update=sum(update.values()) + reductions["assistant"],
        image=sum(value for _, _, value in seconds(flops.measuring(recipe), 1.0)),
    )


def overlapped(groups: Mapping[str, float]) -> float:
    """Seconds from the learner's x_0 to its gradient, from what every group does for it in that time.

    Groups work side by side: the calls of all of them start together. Within a group one device does one call after
    the other, the learner's own rewards and denoisers included. The learner's own pass overlaps with nothing.
    """
    return max(groups.values(), default=0.0)


def _located(works: Iterable[Work], placed: Placed) -> Iterator[tuple[str, Work]]:
    """(group, work); every group that holds rewards decodes for them."""
    works = list(works)
    for work in works:
        if work.role != "decoder":
            yield placed[work.role][0], work
            continue
        scored = [placed[other.role][0] for other in works if other.role.startswith("reward:")]
        for group in dict.fromkeys(scored):
            yield group, replace(work, backwards=work.backwards * scored.count(group) / len(scored))


def _sums(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in pairs:
        found[name] = found.get(name, 0.0) + value
    return found


def _reductions(recipe: Recipe, placed: Placed, networks: Footprints, rates: Rates, role: str, busy: float) -> float:
    """Seconds that an update of a role waits for its ranks' collectives, beyond ``busy``, its own computation."""
    if not rates.link:
        return 0.0
    settings = recipe.optimization
    optimizer = settings.generator if role == "learner" else settings.assistant
    setting = zero_setting(recipe, placed[role][1])
    _, micro_batches = batch_geometry(settings.batch_size, setting.ranks, settings.micro_batch, role)
    sent = zero.collectives(zero.sizes_of(networks.network(optimizer.lora).sizes()), setting, micro_batches)
    overlapping = sum(item.bytes for item in sent if item.overlaps) / rates.link
    return sum(item.bytes for item in sent if not item.overlaps) / rates.link + max(0.0, overlapping - busy)


def _copies(recipe: Recipe, placed: Placed, networks: Footprints) -> dict[str, float]:
    """Seconds of copies of the whole network in float32 through host memory."""
    weights, found = 4 * networks.network().parameters(), {}
    if placed["generator"][0] != placed["learner"][0]:
        found["weights to the generator"] = weights / _STORE
    if recipe.optimization.ema is not None:
        found["moving average"] = weights / _PAGEABLE
    return found
