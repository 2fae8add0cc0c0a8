"""The whole plan of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlhf_t2i.plugins import traits
from rlhf_t2i.recipe.placement import batch_geometry, check_placement
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning import cost, memory, time, traffic
from rlhf_t2i.tools.planning.graph import NOW, Rules
from rlhf_t2i.tools.planning.memory import TRAINED, GroupPlan
from rlhf_t2i.tools.planning.speed import Speed
from rlhf_t2i.tools.planning.traffic import Traffic

if TYPE_CHECKING:
    from rlhf_t2i.families.footprints import Footprints


@dataclass(frozen=True)
class Plan:
    """Result of :func:`make`."""

    mode: str
    share_devices: bool
    precision: str
    zero_stage: int
    offload: bool
    latents: tuple[int, int, int]
    batch: Mapping[str, Mapping[str, int]]
    groups: tuple[GroupPlan, ...]
    parts: Mapping[str, int | None]
    traffic: tuple[Traffic, ...]
    weights_sync: int
    disk: cost.Disk
    notes: tuple[str, ...] = field(default=())

    @property
    def devices(self) -> int:
        """Devices of all groups."""
        return sum(group.devices for group in self.groups)


def check(recipe: Recipe) -> None:
    """Refuse what a run would refuse before its roles start, but for missing prompts, which a plan does not need.

    Models on the hub are not fetched: of those only their published configurations are read.

    Raises:
        UsageError: As of the run.
    """
    from rlhf_t2i.training import checks

    checks.check_plugins(recipe)
    if checks.are_local(recipe):
        checks.check_models(recipe)


def make(recipe: Recipe, networks: Footprints | None = None) -> Plan:
    """Plan a run.

    Args:
        recipe: The recipe.
        networks: Of it, if they are at hand; what was counted before is not counted again.

    Raises:
        UsageError: Roles or batches that do not divide, a reward that learns in several processes, a size the decoder
            cannot produce, a model folder that is missing, damaged or of an unknown family.
    """
    placed, networks = check_placement(recipe), networks or networks_of(recipe)
    traits.check_online_placement(recipe)
    settings, batch = recipe.optimization, _batch(recipe, placed)
    rewards = {f"reward:{label}": network for label, (_, network) in networks.rewards.items()}
    parts = {
        "network": networks.network().parameters(),
        "text encoders": networks.text_encoders().parameters(),
        "decoder": networks.decoder().parameters(),
        **{role: None if network is None else network.parameters() for role, network in rewards.items()},
    }
    apart = placed["generator"][0] != placed["learner"][0]
    return Plan(
        mode=recipe.placement.mode,
        share_devices=recipe.placement.share_devices,
        precision=settings.precision,
        zero_stage=settings.zero_stage if recipe.placement.mode == "ray" else 0,
        offload=settings.offload_optimizer and recipe.placement.mode == "ray",
        latents=networks.store.latent_shape,
        batch=batch,
        groups=group_plans(recipe, placed, networks),
        parts=parts,
        traffic=traffic.per_image(recipe, placed, networks.store.latent_shape),
        weights_sync=4 * networks.network().parameters() if apart else 0,
        disk=cost.disk(recipe, placed, networks),
        notes=tuple(
            f"{role}: its network is not known here: its memory and time are not counted"
            for role, count in parts.items()
            if count is None
        ),
    )


def group_plans(recipe: Recipe, placed: Mapping[str, tuple[str, int]], networks: Footprints) -> tuple[GroupPlan, ...]:
    """What every process of every group holds."""
    learner, groups = _batch(recipe, placed)["learner"], []
    for name, devices in dict.fromkeys(placed.values()):
        roles = [role for role, (group, _) in placed.items() if group == name]
        if recipe.placement.mode == "local" or "reward" in recipe.placement.groups[name].roles:
            roles.append("reward")
        groups.append(memory.group_plan(recipe, name, devices, roles, networks, learner["micro"], learner["ranks"]))
    return tuple(groups)


def _batch(recipe: Recipe, placed: Mapping[str, tuple[str, int]]) -> Mapping[str, Mapping[str, int]]:
    """How both trained roles split a batch."""
    settings, found = recipe.optimization, {}
    for role in TRAINED:
        ranks = placed[role][1]
        micro, accumulation = batch_geometry(settings.batch_size, ranks, settings.micro_batch, role)
        found[role] = {"global": settings.batch_size, "ranks": ranks, "micro": micro, "accumulation": accumulation}
    return found


def networks_of(recipe: Recipe) -> Footprints:
    """The networks of a recipe, to be counted."""
    from rlhf_t2i.families.footprints import Footprints

    return Footprints(recipe)


def step_time(recipe: Recipe, speed: Speed, rules: Rules = NOW, networks: Footprints | None = None) -> time.StepTime:
    """Estimate the seconds per step; errors as of :func:`make`.

    Args:
        recipe: The recipe.
        speed: Of every device.
        rules: Which calls overlap.
        networks: Of the recipe, if they are at hand.
    """
    return time.estimate(recipe, check_placement(recipe), networks or networks_of(recipe), speed, rules)
