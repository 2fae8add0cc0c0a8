"""What a recipe will need, before anything starts: parameters, memory by kind, traffic, batch geometry.

Parameters are counted on the meta device from configurations, activations by letting shapes flow through the networks
there. The CUDA context, fragmentation and library workspaces are not included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf_t2i.errors import UsageError
from rlhf_t2i.geometry import batch_geometry, check_placement
from rlhf_t2i.models import architectures, sources
from rlhf_t2i.models.architectures import Config
from rlhf_t2i.recipe import Recipe

_TRAINED = ("learner", "assistant")
_BYTES = {"fp32": 4, "bf16": 2}
# The tensors of the wire are float32, whatever the networks compute in.
_WIRE = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one role in one process, by kind; ``host`` is in the machine's memory, not on the device."""

    weights: int = 0
    gradients: int = 0
    optimiser: int = 0
    activations: int = 0
    host: int = 0

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimiser + self.activations


@dataclass(frozen=True)
class RolePlan:
    """One role of a group: its parameters and what they cost in one process."""

    role: str
    parameters: int | None
    memory: Memory


@dataclass(frozen=True)
class GroupPlan:
    """A set of devices, one process each, and what every process holds."""

    name: str
    devices: int
    roles: tuple[RolePlan, ...]

    @property
    def memory(self) -> Memory:
        """The sum of a process. Roles that share one take turns: the learner's graph waits while each other runs."""
        total = Memory()
        for item in self.roles:
            total = Memory(*(getattr(total, k) + getattr(item.memory, k) for k in Memory.__dataclass_fields__))
        serving = [r.memory.activations for r in self.roles if r.role.startswith("reward")]
        scoring = [r.memory.activations for r in self.roles if r.role in ("assistant", "reference")]
        idle = min(sum(serving), sum(scoring))
        return replace(total, activations=total.activations - idle)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one image of an update moves between two roles in different groups, there and back."""

    source: str
    target: str
    sent: int
    returned: int
    when: str


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


class _Networks:
    """The configurations of a recipe's networks, as far as they are at hand."""

    def __init__(self, recipe: Recipe) -> None:
        self.notes: list[str] = []
        self._reference = sources.parse(recipe.models.reference)
        self.unet = self._config("unet")
        self.text = [c for c in (self._config("text_encoder"), self._config("text_encoder_2", optional=True)) if c]
        self.vae = self._vae(recipe)
        self.latents = self._latents(recipe.models.resolution)
        self.rewards = {
            choice.key: self._reward(choice.key, choice.name, choice.options)
            for choice in (*recipe.algorithm.rewards, *recipe.algorithm.eval_rewards)
        }

    def _config(self, part: str, optional: bool = False) -> Config | None:
        file = f"{part}/config.json"
        if not self._reference.is_local:
            family = architectures.PUBLISHED.get(self._reference.location)
            if family is not None:
                return family.parts.get(part)
        return self._read(self._reference, file, optional)

    def _read(self, source: sources.ModelSource, file: str, optional: bool = False) -> Config | None:
        if source.is_local:
            if optional and not (Path(source.location) / file).is_file():
                return None
            return sources.read_json(source, file)
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source.location, file, revision=source.revision)
        if isinstance(cached, str):
            return sources.read_json(sources.ModelSource(str(Path(cached).parent.resolve())), Path(cached).name)
        if not optional:
            self.notes.append(f"{source.location} is not in the hub cache: {file} is not counted")
        return None

    def _vae(self, recipe: Recipe) -> Config | None:
        if recipe.models.vae is None:
            return self._config("vae")
        source = sources.parse(recipe.models.vae)
        return architectures.PUBLISHED_VAES.get(source.location) or self._read(source, "config.json")

    def _latents(self, resolution: int) -> tuple[int, int, int]:
        channels = int((self.unet or {}).get("in_channels", 4))
        vae = self.vae or {}
        levels = vae.get("block_out_channels") or vae.get("decoder_block_out_channels") or [0] * 4
        factor = 2 ** (len(levels) - 1)
        if resolution % factor:
            raise UsageError(f"models.resolution: {resolution} is not a multiple of the VAE's {factor}")
        return channels, resolution // factor, resolution // factor

    def _reward(self, label: str, name: str, options: Mapping[str, Any]) -> tuple[str, Config | None, int | None]:
        """(where its weights are, configuration, parameters) of a reward's model."""
        model = options.get("model")
        if not isinstance(model, str):
            known = name in ("pickscore", "hpsv2")
            config = architectures.CLIP_H if known else None
            if not known:
                self.notes.append(f"reward {label!r}: its model's configuration is not at hand, so it is not counted")
            return f"default of {name}", config, architectures.count_parameters(config) if config else None
        source = sources.parse(model)
        if source.location == "yuvalkirstain/PickScore_v1":
            return source.location, architectures.CLIP_H, architectures.count_parameters(architectures.CLIP_H)
        config = self._read(source, "config.json", optional=True)
        counted = _count(config) if config else None
        if counted is None and source.is_local:
            counted = _count_files(Path(source.location))
        if counted is None:
            self.notes.append(f"reward {label!r}: {model} has no configuration this project can count")
        return source.location, config, counted


def make(recipe: Recipe) -> Plan:
    """Plan a run.

    Raises:
        UsageError: Roles or batches that do not divide, a resolution the VAE cannot produce, a damaged model folder.
    """
    placed = check_placement(recipe)
    networks = _Networks(recipe)
    settings = recipe.optimisation
    ranks = {role: placed[role][1] for role in _TRAINED}
    batch = {}
    for role in _TRAINED:
        micro, accumulation = batch_geometry(settings.batch_size, ranks[role], settings.micro_batch, role)
        batch[role] = {
            "global": settings.batch_size,
            "ranks": ranks[role],
            "micro": micro,
            "accumulation": accumulation,
        }
    parts = {
        "unet": _count(networks.unet),
        "text encoders": sum(c for c in (_count(config) for config in networks.text) if c) if networks.text else None,
        "vae": _count(networks.vae),
        **{f"reward:{label}": counted for label, (_, _, counted) in networks.rewards.items()},
    }
    names = dict.fromkeys(group for group, _ in placed.values())
    groups = []
    for name in names:
        roles = [role for role, (group, _) in placed.items() if group == name]
        devices = next(count for group, count in placed.values() if group == name)
        groups.append(_group(recipe, name, devices, roles, networks, parts, batch["learner"]["micro"], ranks))
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
        traffic=_traffic(recipe, placed, networks.latents),
        weights_sync=0 if placed["generator"][0] == placed["learner"][0] else 4 * (parts["unet"] or 0),
        notes=tuple(networks.notes),
    )


def trained_memory(parameters: int, ranks: int, stage: int, precision: str, offload: bool, distributed: bool) -> Memory:
    """Weights, gradients and optimiser states of a network under AdamW in one process.

    ZeRO keeps float32 master weights beside the compute weights from stage 1 on, and divides optimiser states (1),
    gradients (2) and weights (3) by the ranks; one process without Ray is plain float32 PyTorch.
    """
    if not distributed:
        return Memory(weights=4 * parameters, gradients=4 * parameters, optimiser=8 * parameters)
    width = _BYTES[precision]
    share = -(-parameters // ranks)
    master = 4 if stage or precision == "bf16" else 0
    states = (share if stage else parameters) * (8 + master)
    return Memory(
        weights=width * (share if stage == 3 else parameters),
        gradients=width * (share if stage >= 2 else parameters),
        optimiser=0 if offload and stage else states,
        host=states if offload and stage else 0,
    )


def _group(
    recipe: Recipe,
    name: str,
    devices: int,
    roles: list[str],
    networks: _Networks,
    parts: Mapping[str, int | None],
    micro: int,
    ranks: Mapping[str, int],
) -> GroupPlan:
    from rlhf_t2i import activations

    settings = recipe.optimisation
    width = _BYTES[settings.precision]
    distributed = recipe.placement.mode == "ray"
    unet = parts["unet"] or 0
    # Several servers share a micro-batch; a server of several learner ranks keeps the graphs of all, but a reward call
    # is over when it returns.
    images = -(-micro * ranks["learner"] // devices)
    scored = min(micro, images)
    saved = activations.of_recipe(networks.unet, networks.vae, networks.latents[1], settings.precision)

    def kept(kind: str) -> int:
        item = saved.get(kind)
        return 0 if item is None else (item.checkpointed if settings.gradient_checkpointing else item.plain)

    plans = []
    needs_vjp = recipe.algorithm.divergence.name != "kl"
    for role in roles:
        if role in _TRAINED:
            memory = trained_memory(
                unet, devices, settings.zero_stage, settings.precision, settings.offload_optimizer, distributed
            )
            if role == "learner" and settings.ema is not None:
                memory = replace(memory, host=memory.host + 4 * unet)
            # The assistant trains on micro-batches of its own, and serves the learner's.
            batch = micro if role == "learner" else max(images, settings.micro_batch or settings.batch_size // devices)
            plans.append(RolePlan(role, unet or None, replace(memory, activations=batch * kept("train"))))
        elif role == "generator":
            shared = "learner" in roles
            own = Memory() if shared else Memory(weights=4 * unet)
            plans.append(RolePlan(role, 0 if shared else unet or None, own))
        elif role == "reference":
            branches = 2 if recipe.algorithm.cfg.scale not in (0, 1) and recipe.algorithm.cfg.mode == "inner" else 1
            active = images * branches * kept("frozen") if needs_vjp else 0
            plans.append(RolePlan(role, unet or None, Memory(weights=width * unet, activations=active)))
    if any(r.role in ("learner", "generator", "assistant", "reference") for r in plans):
        text = parts["text encoders"]
        plans.append(RolePlan("text encoders", text, Memory(weights=width * (text or 0))))
    plans += _rewards(recipe, roles, networks, parts, scored * kept("decoder"), scored)
    return GroupPlan(name, devices, tuple(plans))


def _rewards(
    recipe: Recipe, roles: list[str], networks: _Networks, parts: Mapping[str, int | None], decoding: int, images: int
) -> list[RolePlan]:
    """The VAE and the rewards of a process; rewards that name one model share it."""
    hosted = [role for role in roles if role.startswith("reward:")]
    if not hosted:
        return []
    from rlhf_t2i import activations

    vae = parts["vae"]
    plans = [RolePlan("reward: VAE", vae, Memory(weights=4 * (vae or 0), activations=decoding))]
    seen: set[str] = set()
    for role in hosted:
        where, config, counted = networks.rewards[role.partition(":")[2]]
        fresh = where not in seen
        seen.add(where)
        saved = activations.of_reward(config)
        kept = saved.checkpointed if recipe.optimisation.gradient_checkpointing else saved.plain
        weights = 4 * (counted or 0) if fresh else 0
        plans.append(RolePlan(role, counted if fresh else 0, Memory(weights=weights, activations=images * kept)))
    return plans


def _traffic(
    recipe: Recipe, placed: Mapping[str, tuple[str, int]], latents: tuple[int, int, int]
) -> tuple[Traffic, ...]:
    """Bytes an image moves between groups; roles of one process call each other without copies."""
    size = _WIRE * latents[0] * latents[1] * latents[2]
    home = placed["learner"][0]
    vjp = recipe.algorithm.divergence.name != "kl"
    outer = recipe.algorithm.cfg.mode == "outer" and recipe.algorithm.cfg.scale > 0
    found = []
    for role, predictions in (("assistant", 1), ("reference", 2 if outer else 1)):
        if placed[role][0] != home:
            # Forward: x_t out, prediction back. Product: cotangent out, with x_t should the graph be lost; gradient
            # back.
            sent = size + (size + predictions * size if vjp else 0)
            found.append(Traffic("learner", role, sent, predictions * size + (size if vjp else 0), "generator step"))
    trained = [f"reward:{choice.key}" for choice in recipe.algorithm.rewards]
    for group in dict.fromkeys(placed[role][0] for role in trained if placed[role][0] != home):
        here = [role for role in trained if placed[role][0] == group]
        names = ", ".join(role.partition(":")[2] for role in here)
        found.append(Traffic("learner", f"reward ({names})", size, len(here) * (size + _WIRE), "generator step"))
    if placed["assistant"][0] != placed["generator"][0]:
        found.append(Traffic("assistant", "generator", 0, size, "assistant step"))
    return tuple(found)


def _count(config: Config | None) -> int | None:
    if config is None:
        return None
    try:
        return architectures.count_parameters(config)
    except (ValueError, TypeError, KeyError):
        return None


def _count_files(folder: Path) -> int | None:
    """Parameters in a folder's safetensors, from their headers."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - not a dict
                    size = 1
                    for length in weights.get_slice(key).get_shape():
                        size *= length
                    total += size
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{file} is damaged: {str(error).splitlines()[0]}") from None
    return total or None
