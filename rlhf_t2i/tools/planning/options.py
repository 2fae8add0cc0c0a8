"""Placements of a recipe on a number of devices: which fit, and how many hours each takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe.schema import Group, Recipe
from rlhf_t2i.tools.planning import cost
from rlhf_t2i.tools.planning.devices import USABLE, Rates
from rlhf_t2i.tools.planning.fit import changed
from rlhf_t2i.tools.planning.plan import make, step_time

_SPLITS = (
    ("train", ("learner", "generator", "reward"), "score", ("assistant", "reference")),
    ("train", ("learner", "generator"), "score", ("assistant", "reference", "reward")),
    ("train", ("learner", "generator", "assistant"), "score", ("reference", "reward")),
)
"""Two groups that share the roles; all roles on all devices is the first option."""


@dataclass(frozen=True)
class Option:
    """One placement.

    Attributes:
        recipe: The recipe with it.
        memory: Bytes that the fullest process needs.
        fits: Whether every process fits.
        duration: Of the whole run.
    """

    recipe: Recipe
    memory: int
    fits: bool
    duration: cost.Duration

    def describe(self) -> str:
        """``4 learner, generator + 4 assistant, reference``: devices and roles of its groups."""
        groups = self.recipe.placement.groups.values()
        return " + ".join(f"{group.devices} {', '.join(group.roles)}" for group in groups)

    def yaml(self) -> str:
        """The groups, as a recipe and ``--set placement.groups`` take them."""
        groups = (
            f"{name}: {{devices: {group.devices}, roles: [{', '.join(group.roles)}]}}"
            for name, group in self.recipe.placement.groups.items()
        )
        return f"{{{', '.join(groups)}}}"


def options(recipe: Recipe, devices: int, rates: Rates, memory: float) -> list[Option]:
    """Every placement that is tried, the fastest that fits first; then those that do not fit, by their need.

    Args:
        recipe: The recipe; its own groups are not used.
        devices: Devices in all.
        rates: Of one device.
        memory: GiB of one device.

    Raises:
        UsageError: The batch cannot be split over so many devices in any way.
    """
    limit, found, refusal = memory * 2**30 * USABLE, [], UsageError("")
    for groups in _candidates(devices, recipe.optimization.batch_size // (recipe.optimization.micro_batch or 1)):
        placed = changed(recipe, {"placement.mode": "ray", "placement.groups": groups})
        try:
            plan = make(placed)
        except UsageError as error:  # a batch or sizes that do not divide
            refusal = error
            continue
        needed = max(group.memory.device for group in plan.groups)
        spent = cost.duration(placed, step_time(placed, rates), plan.devices)
        found.append(Option(placed, needed, needed <= limit, spent))
    if not found:
        raise UsageError(f"--gpus {devices}: no placement divides the batch: {refusal}")
    return sorted(found, key=lambda option: (not option.fits, option.duration.hours if option.fits else option.memory))


def _candidates(devices: int, batch: int) -> Iterator[Mapping[str, Group]]:
    for size in range(devices, 0, -1):
        if batch % size == 0:  # with fewer of the devices, where the batch does not divide by all
            yield {"all": Group(devices=size, roles=["learner", "generator", "assistant", "reference", "reward"])}
            break
    for first, trained, second, served in _SPLITS:
        for size in _sizes(devices):
            yield {
                first: Group(devices=size, roles=list(trained)),
                second: Group(devices=devices - size, roles=list(served)),
            }


def _sizes(devices: int) -> Sequence[int]:
    """Sizes of a first group of which one divides the other's."""
    return [n for n in range(1, devices) if max(n, devices - n) % min(n, devices - n) == 0]
