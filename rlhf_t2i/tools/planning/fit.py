"""Whether a plan fits a device, and if not, the cheapest change that makes it fit.

Changes are tried by planning again with them, in this order, each alone and then all up to it together:

1. fewer images at once in evaluation
2. smaller micro-batches (the same update; less parallel work per call)
3. bf16 (float32 master weights stay)
4. activation checkpointing (about a third more time)
5. ZeRO-2, then ZeRO-3, where a group has several devices (more traffic)
6. optimizer states in host memory (slower updates; needs ZeRO 1 or more)
7. twice, then four and eight times the devices of the group that does not fit
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning.devices import USABLE
from rlhf_t2i.tools.planning.memory import GroupPlan
from rlhf_t2i.tools.planning.plan import Plan, make

Value = str | int | bool | list[str]
Change = Mapping[str, Value]
_STAGE = "optimization.zero_stage"


@dataclass(frozen=True)
class Fit:
    """Whether a plan fits.

    Attributes:
        limit: Bytes a process may fill.
        group: The first group that does not fit; None when all do.
        role: The role in it with the largest ``kind`` of memory.
        needed: Bytes of that group's process.
        change: Overrides of the recipe that make everything fit; ``{}`` if no tried change does.
    """

    limit: float
    group: str | None = None
    role: str = ""
    kind: str = ""
    needed: int = 0
    change: Change | None = None

    def describe(self) -> str:
        """One sentence."""
        limit = f"the {self.limit / 2**30:.3g} GiB that a device has to use"
        if self.group is None:
            return f"fits: every process needs less than {limit}"
        missing = (
            f"does not fit: a process of group {self.group!r} needs {self.needed / 2**30:.3g} GiB, more than {limit}; "
            f"most of it is the {self.kind} of {self.role}"
        )
        if not self.change:
            return f"{missing}; none of the changes that this command tries makes it fit"
        options = (shlex.quote(f"{key}={_yaml(value)}") for key, value in self.change.items())
        return f"{missing}; cheapest that fits: " + " ".join(f"--set {option}" for option in options)


def check(recipe: Recipe, plan: Plan, memory: float) -> Fit:
    """Compare every process with a device.

    Args:
        recipe: The recipe.
        plan: Its plan.
        memory: GiB of one device.
    """
    limit = memory * 2**30 * USABLE
    group = _first_over(plan, limit)
    if group is None:
        return Fit(limit)
    kinds = ("weights", "gradients", "optimizer", "activations", "buffers")
    role, kind = max(
        ((item, kind) for item in group.roles for kind in kinds), key=lambda pair: getattr(pair[0].memory, pair[1])
    )
    change = _cheapest(recipe, group, limit)
    return Fit(limit, group.name, role.role, kind, group.memory.device, change)


def _first_over(plan: Plan, limit: float) -> GroupPlan | None:
    return next((group for group in plan.groups if group.memory.device > limit), None)


def _cheapest(recipe: Recipe, group: GroupPlan, limit: float) -> Change:
    together: Change = {}
    for change in _changes(recipe, group):
        stage = max(together.get(_STAGE, 0), change.get(_STAGE, 0))
        together = {**together, **change, **({_STAGE: stage} if stage else {})}
        for candidate in (change, together):
            if _fits(recipe, candidate, limit):
                return _without_needless(recipe, candidate, limit)
    return {}


def _without_needless(recipe: Recipe, change: Change, limit: float) -> Change:
    """Dearest first, leave out what is not needed beside the others."""
    for key in list(change)[::-1]:
        rest = {k: v for k, v in change.items() if k != key}
        if _fits(recipe, rest, limit):
            change = rest
    return change


def _changes(recipe: Recipe, group: GroupPlan) -> Iterator[Change]:
    """One at a time, cheapest first."""
    settings, drawn = recipe.optimization, recipe.evaluation.batch_size // 2
    while drawn:
        yield {"evaluation.batch_size": drawn}
        drawn //= 2
    # micro_batch absent means a rank's whole share, however many ranks.
    whole = settings.micro_batch or settings.batch_size
    yield from ({"optimization.micro_batch": n} for n in range(whole - 1, 0, -1) if settings.batch_size % n == 0)
    if settings.precision == "fp32":
        yield {"optimization.precision": "bf16"}
    if not settings.gradient_checkpointing:  # the decoder keeps most for the least work
        yield {"optimization.gradient_checkpointing": ["reward"]}
        yield {"optimization.gradient_checkpointing": ["reward", "reference"]}
    if settings.gradient_checkpointing is not True:
        yield {"optimization.gradient_checkpointing": True}
    if recipe.placement.mode != "ray":
        return
    several = any(item.devices > 1 for item in recipe.placement.groups.values())
    yield from ({_STAGE: n} for n in (2, 3) if several and n > settings.zero_stage)
    if not settings.offload_optimizer:
        yield {"optimization.offload_optimizer": True, _STAGE: max(1, settings.zero_stage)}
    for factor in (2, 4, 8):
        devices = factor * group.devices
        yield {
            f"placement.groups.{group.name}.devices": devices,
            _STAGE: max(2, settings.zero_stage),
        }


def _fits(recipe: Recipe, change: Change, limit: float) -> bool:
    try:
        return _first_over(make(changed(recipe, change)), limit) is None
    except (UsageError, ValidationError):  # a batch or placement that does not divide; keys that exclude each other
        return False


def changed(recipe: Recipe, change: Mapping[str, object]) -> Recipe:
    """The recipe with dotted keys replaced."""
    data = recipe.model_dump()
    for key, value in change.items():
        *path, last = key.split(".")
        section = data
        for name in path:
            section = section[name]
        section[last] = value
    return Recipe.model_validate(data)


def _yaml(value: Value) -> str:
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
