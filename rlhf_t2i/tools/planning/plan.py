"""The whole plan of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf_t2i.recipe.placement import batch_geometry, check_placement
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning import memory, traffic
from rlhf_t2i.tools.planning.memory import TRAINED, GroupPlan
from rlhf_t2i.tools.planning.networks import Networks, count_footprint, count_parameters
from rlhf_t2i.tools.planning.traffic import Traffic


@dataclass(frozen=True)
class Plan:
    """Everything :func:`make` found out."""

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
    notes: tuple[str, ...] = field(default=())

    @property
    def devices(self) -> int:
        """Devices of all groups."""
        return sum(group.devices for group in self.groups)


def make(recipe: Recipe) -> Plan:
    """Plan a run.

    Raises:
        UsageError: Roles or batches that do not divide, a resolution the VAE cannot produce, a damaged model folder.
    """
    placed = check_placement(recipe)
    networks = Networks(recipe)
    settings = recipe.optimization
    ranks = {role: placed[role][1] for role in TRAINED}
    batch = {}
    for role in TRAINED:
        micro, accumulation = batch_geometry(settings.batch_size, ranks[role], settings.micro_batch, role)
        batch[role] = {
            "global": settings.batch_size,
            "ranks": ranks[role],
            "micro": micro,
            "accumulation": accumulation,
        }
    parts = {
        "unet": count_parameters(networks.unet),
        "text encoders": sum(c for c in (count_parameters(config) for config in networks.text) if c)
        if networks.text
        else None,
        "vae": count_parameters(networks.vae),
        **{f"reward:{label}": count_footprint(footprint) for label, footprint in networks.rewards.items()},
    }
    names = dict.fromkeys(group for group, _ in placed.values())
    groups = []
    for name in names:
        roles = [role for role, (group, _) in placed.items() if group == name]
        devices = next(count for group, count in placed.values() if group == name)
        groups.append(memory.of_group(recipe, name, devices, roles, networks, parts, batch["learner"]["micro"], ranks))
    return Plan(
        mode=recipe.placement.mode,
        share_devices=recipe.placement.share_devices,
        precision=settings.precision,
        zero_stage=settings.zero_stage if recipe.placement.mode == "ray" else 0,
        offload=settings.offload_optimizer and recipe.placement.mode == "ray",
        latents=networks.latents,
        batch=batch,
        groups=tuple(groups),
        parts=parts,
        traffic=traffic.of_image(recipe, placed, networks.latents),
        weights_sync=0 if placed["generator"][0] == placed["learner"][0] else 4 * (parts["unet"] or 0),
        notes=tuple(networks.notes),
    )
