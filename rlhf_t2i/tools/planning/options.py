"""Placements of a recipe on a number of devices, each with the settings that make it fast and let it fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml
from pydantic import ValidationError

from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins import traits
from rlhf_t2i.recipe.placement import check_placement
from rlhf_t2i.recipe.schema import Group, Recipe
from rlhf_t2i.tools.planning import cost, time
from rlhf_t2i.tools.planning.devices import USABLE
from rlhf_t2i.tools.planning.fit import changed
from rlhf_t2i.tools.planning.graph import NOW, Rules
from rlhf_t2i.tools.planning.plan import group_plans
from rlhf_t2i.tools.planning.speed import Speed
from rlhf_t2i.tools.planning.time import StepTime

if TYPE_CHECKING:
    from rlhf_t2i.families.footprints import Footprints

_SPLITS = (
    ("train", ("learner", "generator", "reward"), "score", ("assistant", "reference")),
    ("train", ("learner", "generator"), "score", ("assistant", "reference", "reward")),
    ("train", ("learner", "generator", "assistant"), "score", ("reference", "reward")),
    ("train", ("learner", "generator", "assistant", "reference"), "score", ("reward",)),
)
"""Two groups that share the roles; all roles on all devices is the first option."""
_ALL = ("learner", "generator", "assistant", "reference", "reward")
_MICRO_BATCHES = (1, 2, 4, 8, 16)
_STAGES = ((1, 2), (3,))
"""ZeRO-3 where nothing else fits: what its many small gathers cost is not known, so that its seconds are too few."""
_RECOMPUTED: tuple[bool | list[str], ...] = (False, ["reward"], ["reward", "reference"], True)
"""From the fastest to the smallest."""


@dataclass(frozen=True)
class Option:
    """One placement with the settings that are fastest on it.

    Attributes:
        recipe: The recipe with it.
        memory: Bytes that the fullest process needs.
        fits: Whether every process fits.
        seconds: Of a step.
        duration: Of the whole run.
        as_it_is: Whether it is the recipe's own.
    """

    recipe: Recipe
    memory: int
    fits: bool
    seconds: StepTime
    duration: cost.Duration
    as_it_is: bool = False

    @property
    def images_per_second(self) -> float:
        """Of generator updates."""
        return self.recipe.optimization.batch_size / self.seconds.step

    @property
    def idle(self) -> float:
        """Share of all devices' time in which they wait for others."""
        sizes = {name: group.devices for name, group in self.recipe.placement.groups.items()}
        used = {name: share for name, share in self.seconds.idle.items() if name in sizes}
        return sum(used.get(name, 1.0) * size for name, size in sizes.items()) / sum(sizes.values())

    @property
    def limit(self) -> tuple[str, str, float]:
        """What limits it: the busiest group, its largest role, and that role's share of the step."""
        idle = self.seconds.idle
        group = min(idle, key=lambda name: idle[name])
        busy = {role: spent for (name, role), spent in self.seconds.timeline.busy().items() if name == group}
        role = max(busy, key=lambda name: busy[name])
        return group, role, busy[role] / self.seconds.step

    def describe(self) -> str:
        """``4 learner, generator + 4 assistant, reference``: devices and roles of its groups."""
        groups = self.recipe.placement.groups.values()
        if len(groups) == 1:
            return f"{next(iter(groups)).devices} with all roles"
        return " + ".join(f"{group.devices} {', '.join(group.roles)}" for group in groups)

    def settings(self) -> str:
        """The micro-batch, ZeRO's stage and what is recomputed, in a few words."""
        settings = self.recipe.optimization
        roles = settings.gradient_checkpointing
        again = "nothing" if roles is False else "all roles" if roles is True else ", ".join(roles)
        return f"micro-batch {settings.micro_batch}, ZeRO-{settings.zero_stage}, recompute {again}"

    def lines(self) -> str:
        """The lines of a recipe that differ, as YAML."""
        settings = self.recipe.optimization
        keys = {name: getattr(settings, name) for name in ("micro_batch", "zero_stage", "gradient_checkpointing")}
        groups = {
            name: {"devices": group.devices, "roles": group.roles}
            for name, group in self.recipe.placement.groups.items()
        }
        flat = [f"  {key}: {_flow(value)}" for key, value in keys.items()]
        placed = [f"    {name}: {_flow(group)}" for name, group in groups.items()]
        return "\n".join(["optimization:", *flat, "placement:", "  groups:", *placed])

    def as_json(self) -> dict[str, object]:
        """Plain data."""
        settings = self.recipe.optimization
        group, role, share = self.limit
        return {
            "groups": {name: group.model_dump() for name, group in self.recipe.placement.groups.items()},
            "micro_batch": settings.micro_batch,
            "zero_stage": settings.zero_stage,
            "gradient_checkpointing": settings.gradient_checkpointing,
            "fits": self.fits,
            "memory": self.memory,
            "seconds": self.seconds.step,
            "images_per_second": self.images_per_second,
            "gpu_hours": self.duration.gpu_hours,
            "exposed_communication": self.seconds.exposed,
            "idle": self.idle,
            "idle_by_group": dict(self.seconds.idle),
            "limit": {"group": group, "role": role, "share": share},
            "as_it_is": self.as_it_is,
        }


@dataclass(frozen=True)
class Search:
    """What placements are compared for.

    Attributes:
        recipe: The recipe.
        networks: Of it.
        speed: Of one device.
        memory: GiB of one device.
        rules: Which calls overlap.
    """

    recipe: Recipe
    networks: Footprints
    speed: Speed
    memory: float
    rules: Rules = NOW

    def options(self, devices: int, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Option]:
        """The best option of every placement, the fastest that fits first; then those that do not fit, by their need.

        Args:
            devices: In all.
            progress: Called with the placements tried so far and all of them.

        Raises:
            UsageError: One device, and a reward that learns, which needs one of its own.
        """
        placements, found = list(self._placements(devices)), []
        for number, groups in enumerate(placements):
            progress(number, len(placements))
            best = self._best(groups)
            if best is not None:
                found.append(best)
        progress(len(placements), len(placements))
        if not found:
            raise UsageError(f"--gpus {devices}: a reward that learns has one process, the other roles need more")
        return sorted(found, key=lambda o: (not o.fits, o.duration.hours if o.fits else o.memory))

    def as_it_is(self) -> Option:
        """The recipe's own placement and settings."""
        return self._planned(self.recipe, self._memory(self.recipe), as_it_is=True)

    def _best(self, groups: Mapping[str, Group]) -> Option | None:
        """The fastest settings that fit; if none do, those that need least. None: the batch cannot be split."""
        smallest: list[tuple[int, Recipe]] = []
        for stages in _STAGES:
            fitting: list[Option] = []
            for micro, stage in itertools.product(_MICRO_BATCHES, stages):
                tried = [*self._tried(groups, micro, stage)]
                smallest += tried[-1:]
                if tried and tried[-1][0] <= self._limit:
                    fitting.append(self._planned(tried[-1][1], tried[-1][0]))
            if fitting:
                return min(fitting, key=lambda option: option.duration.hours)
        if not smallest:
            return None
        memory, recipe = min(smallest, key=lambda pair: pair[0])
        return self._planned(recipe, memory)

    def _tried(self, groups: Mapping[str, Group], micro: int, stage: int) -> Iterator[tuple[int, Recipe]]:
        """(bytes, recipe), recomputing more until it fits."""
        for recomputed in _RECOMPUTED:
            keys = {"micro_batch": micro, "zero_stage": stage, "gradient_checkpointing": recomputed}
            recipe = self._with(groups, keys)
            if recipe is None:
                return
            memory = self._memory(recipe)
            yield memory, recipe
            if memory <= self._limit:
                return

    def _with(self, groups: Mapping[str, Group], keys: Mapping[str, object]) -> Recipe | None:
        """The recipe in a placement; None where it is refused."""
        change: dict[str, object] = {"placement.mode": "ray", "placement.groups": groups}
        change |= {f"optimization.{key}": value for key, value in keys.items()}
        try:
            recipe = changed(self.recipe, change)
            traits.resolve(recipe)
            check_placement(recipe)
        except (UsageError, ValidationError):  # a batch or sizes that do not divide; keys that exclude each other
            return None
        return recipe

    def _memory(self, recipe: Recipe) -> int:
        return max(group.memory.device for group in group_plans(recipe, check_placement(recipe), self.networks))

    def _planned(self, recipe: Recipe, memory: int, as_it_is: bool = False) -> Option:
        seconds = time.estimate(recipe, check_placement(recipe), self.networks, self.speed, self.rules)
        groups = recipe.placement.groups.values()
        devices = 1 if recipe.placement.mode == "local" else sum(group.devices for group in groups)
        spent = cost.duration(recipe, seconds, devices)
        return Option(recipe, memory, memory <= self._limit, seconds, spent, as_it_is)

    @property
    def _limit(self) -> float:
        return self.memory * 2**30 * USABLE

    def _placements(self, devices: int) -> Iterator[Mapping[str, Group]]:
        """Rewards that learn have one process of their own; the other roles share the rest."""
        learned = [f"reward:{key}" for key in traits.resolve(self.recipe).online]
        apart = {"learn": Group(devices=1, roles=learned)} if learned else {}
        rest = devices - len(apart)
        for size in range(rest, 0, -1):
            if self.recipe.optimization.batch_size % size == 0:  # fewer, where the batch does not divide by all
                yield {"all": Group(devices=size, roles=list(_ALL)), **apart}
                break
        for first, trained, second, served in _SPLITS:
            for size in _sizes(rest):
                yield {
                    first: Group(devices=size, roles=list(trained)),
                    second: Group(devices=rest - size, roles=list(served)),
                    **apart,
                }


def _flow(value: object) -> str:
    """YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False).splitlines()[0]


def _sizes(devices: int) -> Sequence[int]:
    """Sizes of a first group of which one divides the other's."""
    return [n for n in range(1, devices) if max(n, devices - n) % min(n, devices - n) == 0]
