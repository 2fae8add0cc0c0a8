"""Batch and placement arithmetic: who does how much, where. Nothing here imports torch or Ray."""

from __future__ import annotations

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe.mistakes import hint
from rlhf_t2i.recipe.schema import ROLES, Recipe

LOCAL_GROUP = "local"
_REWARD = "reward"


def batch_geometry(batch_size: int, ranks: int, micro_batch: int | None, role: str = "learner") -> tuple[int, int]:
    """Split a global batch: ``batch_size = ranks x micro x accumulation``.

    Args:
        batch_size: Images an update, over all ranks.
        ranks: Processes that train the role together.
        micro_batch: Images a rank handles at once; None means its whole share.
        role: Named in the error.

    Returns:
        ``(micro, accumulation)``.

    Raises:
        UsageError: They do not divide; the sentence names the three numbers and the nearest ones that do.
    """
    unit = ranks * (micro_batch or 1)
    if batch_size % unit == 0:
        micro = micro_batch or batch_size // ranks
        return micro, batch_size // (ranks * micro)
    below = batch_size // unit * unit
    sizes = f"{below} or {below + unit}" if below else f"{unit}"
    fixes = [f"batch_size {sizes}"]
    share, rest = divmod(batch_size, ranks)
    if micro_batch is not None and rest == 0 and share:
        fits = max(size for size in range(1, min(share, micro_batch) + 1) if share % size == 0)
        fixes.append(f"micro_batch {fits}")
    micro_text = f" x micro_batch {micro_batch} = {unit}" if micro_batch is not None else ""
    raise UsageError(
        f"optimization.batch_size {batch_size} is not a multiple of {role} ranks {ranks}{micro_text}: "
        f"use {', or '.join(fixes)}"
    )


def check_placement(recipe: Recipe) -> dict[str, tuple[str, int]]:
    """Where every role lives, after the defaults and rules of ``placement:``.

    Every role is placed exactly once. ``reward`` takes every reward that no ``reward:LABEL`` places; an unplaced
    generator shares the learner's processes. Of the learner's ranks and another group's, one divides the other, so that
    every rank talks to the same number of partners. Learner and assistant must be able to split the batch.

    Returns:
        ``{"learner": (group, devices), ..., "reward:LABEL": (group, devices), ...}``, one ``reward:LABEL`` for each
        reward and eval reward. In local mode every group is ``local``, of one device.

    Raises:
        UsageError: One sentence naming the group, the role and the fix.
    """
    labels = [choice.key for choice in (*recipe.algorithm.rewards, *recipe.algorithm.eval_rewards)]
    wanted = [role for role in ROLES if role != _REWARD] + [f"{_REWARD}:{label}" for label in labels]
    if recipe.placement.mode == "local":
        _check_batches(recipe, 1, 1)
        return dict.fromkeys(wanted, (LOCAL_GROUP, 1))

    placed = _placed(recipe, labels)
    placed.setdefault("generator", placed.get("learner", ""))
    if _REWARD in placed:
        for label in labels:
            placed.setdefault(f"{_REWARD}:{label}", placed[_REWARD])
    for role in wanted:
        if not placed.get(role):
            raise UsageError(f"placement.groups: no group has the role {role!r}: add it to one")

    devices = {name: group.devices for name, group in recipe.placement.groups.items()}
    _check_sizes(recipe, placed, devices)
    _check_batches(recipe, devices[placed["learner"]], devices[placed["assistant"]])
    return {role: (placed[role], devices[placed[role]]) for role in wanted}


def callers_per_server(recipe: Recipe, servers: int) -> int:
    """Ranks of the learner that call each of so many processes of another role."""
    return max(1, check_placement(recipe)["learner"][1] // servers)


def _placed(recipe: Recipe, labels: list[str]) -> dict[str, str]:
    """Role -> group name as written, each role known and placed at most once."""
    known = [*ROLES, *(f"{_REWARD}:{label}" for label in labels)]
    placed: dict[str, str] = {}
    for name, group in recipe.placement.groups.items():
        for role in group.roles:
            if role not in known:
                raise UsageError(f"placement.groups.{name}.roles: unknown role {role!r}; {hint(role, known)}")
            if role in placed:
                where = "twice" if placed[role] == name else f"in {placed[role]!r} too"
                raise UsageError(f"placement.groups.{name}.roles: {role!r} is placed {where}: keep it in one group")
            placed[role] = name
    return placed


def _check_sizes(recipe: Recipe, placed: dict[str, str], devices: dict[str, int]) -> None:
    learner = devices[placed["learner"]]
    for role, name in placed.items():
        ranks = devices[name]
        if max(learner, ranks) % min(learner, ranks):
            raise UsageError(
                f"placement.groups.{name}.devices: {ranks} for {role!r} and {learner} for the learner: "
                f"one must divide the other (e.g. {nearest_partner(learner, ranks)})"
            )
    assistant = devices[placed["assistant"]]
    if recipe.optimization.zero_stage == 3 and 1 < assistant < learner:
        # Its forwards and vector-Jacobian products gather parameters from all its ranks: with several learner ranks a
        # rank, the calls of different learners would meet in different orders and wait for each other for ever.
        raise UsageError(
            f"placement.groups.{placed['assistant']}.devices: under ZeRO-3 the assistant's {assistant} ranks cannot "
            f"serve {learner} learner ranks: give it {learner} devices (or 1), or set optimization.zero_stage to 2"
        )


def _check_batches(recipe: Recipe, learner: int, assistant: int) -> None:
    """Both trained roles must be able to split the batch."""
    settings = recipe.optimization
    batch_geometry(settings.batch_size, learner, settings.micro_batch)
    batch_geometry(settings.batch_size, assistant, settings.micro_batch, "assistant")


def nearest_partner(learner: int, ranks: int) -> int:
    """The size nearest to ``ranks`` that divides ``learner`` or is a multiple of it."""
    below = [size for size in range(1, learner + 1) if learner % size == 0]
    above = [ranks // learner * learner, (ranks // learner + 1) * learner]
    return min((size for size in [*below, *above] if size), key=lambda size: (abs(size - ranks), size))
