"""Memory of a process by role and kind, before anything starts.

Parameters are counted on the meta device from configurations, activations by letting shapes flow through the networks
there. The CUDA context, fragmentation and library workspaces are not included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rlhf_t2i.planning.networks import Networks, count_adapters
from rlhf_t2i.recipe import Recipe

TRAINED = ("learner", "assistant")
_BYTES = {"fp32": 4, "bf16": 2}
_SUB_GROUP = 1_000_000_000
"""Parameters that ZeRO-3 updates at once (DeepSpeed's default)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one role in one process, by kind; ``host`` is in the machine's memory, not on the device.

    ``buffers`` are what ZeRO needs over the activations at the worst moment of a backward or an update.
    """

    weights: int = 0
    gradients: int = 0
    optimiser: int = 0
    activations: int = 0
    buffers: int = 0
    host: int = 0

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimiser + self.activations + self.buffers


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
        active = total.activations - min(sum(serving), sum(scoring))
        # A trained role's own backward or update happens while nobody else holds a graph.
        alone = max((r.memory.activations + r.memory.buffers for r in self.roles), default=0)
        return replace(total, activations=active, buffers=max(0, alone - active))


def trained_memory(
    parameters: int, ranks: int, stage: int, precision: str, offload: bool, distributed: bool, accumulates: bool = False
) -> Memory:
    """Weights, gradients and optimiser states of a network under AdamW in one process.

    ZeRO keeps float32 master weights beside the compute weights from stage 1 on, and divides optimiser states (1),
    gradients (2) and weights (3) by the ranks; one process without Ray is plain float32 PyTorch. Stage 3 keeps the
    buffer it reduces gradients in. Offloaded states come with a float32 gradient in host memory, below stage 3 with a
    copy of the weights in the compute precision, in stage 2 with the sum over micro-batches where an update
    ``accumulates``; stage 2 keeps no gradients on the device then.
    """
    if not distributed:
        return Memory(weights=4 * parameters, gradients=4 * parameters, optimiser=8 * parameters)
    from rlhf_t2i.roles.engine import REDUCE_BUCKET

    width = _BYTES[precision]
    share = -(-parameters // ranks)
    master = 4 if stage or precision == "bf16" else 0
    states = (share if stage else parameters) * (8 + master)
    bucket = min(REDUCE_BUCKET, parameters) if stage == 3 else 0
    beside = 4 * share
    if stage < 3:
        beside += width * share + (width * parameters if accumulates and stage == 2 else 0)
    held = 0 if offload and stage == 2 else share if stage >= 2 else parameters
    return Memory(
        weights=width * (share if stage == 3 else parameters),
        gradients=width * (held + bucket),
        optimiser=0 if offload and stage else states,
        host=states + beside if offload and stage else 0,
    )


def update_buffers(
    parameters: int, ranks: int, stage: int, precision: str, offload: bool, accumulates: bool = False
) -> tuple[int, int]:
    """Bytes that DeepSpeed allocates for a while beside what stays: (beside activations, after them).

    In a backward, ZeRO-1 and 2 copy gradients into a bucket; stage 3, whose bucket stays, copies that to scatter it.
    What a rank owns is copied out of the bucket, while activations go, beside the sum so far (stage 2, where an update
    accumulates) or the whole gradient (stage 1). An update flattens the rank's gradients and converts them to float32,
    in stage 3 a sub-group at a time; of offloaded states the host does it. Without ZeRO it converts all,
    after gradients were averaged in flat copies.
    """
    from rlhf_t2i.roles.engine import REDUCE_BUCKET

    width, share, master = _BYTES[precision], -(-parameters // ranks), 4 if precision == "bf16" else 0
    if stage == 0:
        return 0, max(width * min(REDUCE_BUCKET, parameters), master * parameters)
    copied = share if stage == 1 or (stage == 2 and accumulates) else 0
    bucket = width * min(REDUCE_BUCKET, parameters)
    flattened = share if stage < 3 else min(share, _SUB_GROUP)
    return bucket, max(bucket + width * copied, 0 if offload else flattened * (width + master))


def _trained(recipe: Recipe, role: str, unet: int, devices: int, networks: Networks, activations: int) -> Memory:
    """A trained role's memory: of the network, or of its adapters beside the frozen network."""
    settings = recipe.optimisation
    distributed = recipe.placement.mode == "ray"
    optimiser = settings.generator if role == "learner" else settings.assistant
    trained = unet if optimiser.lora is None else count_adapters(networks.unet, optimiser.lora)
    accumulates = settings.micro_batch is not None and settings.micro_batch * devices < settings.batch_size
    memory = trained_memory(
        trained, devices, settings.zero_stage, settings.precision, settings.offload_optimizer, distributed, accumulates
    )
    if optimiser.kind == "adamw_8bit":
        # Both moments take a byte instead of four; their scales, one number in 256, are left out.
        ranks = devices if distributed and settings.zero_stage else 1
        memory = replace(memory, optimiser=memory.optimiser - 6 * -(-trained // ranks))
    if optimiser.lora is not None:
        width = _BYTES[settings.precision] if distributed else 4
        memory = replace(memory, weights=memory.weights + width * unet)
    memory = replace(memory, activations=activations)
    if distributed:
        beside, after = update_buffers(
            trained, devices, settings.zero_stage, settings.precision, settings.offload_optimizer, accumulates
        )
        memory = replace(memory, buffers=max(beside, after - activations))
    return memory


def of_group(
    recipe: Recipe,
    name: str,
    devices: int,
    roles: list[str],
    networks: Networks,
    parts: Mapping[str, int | None],
    micro: int,
    ranks: Mapping[str, int],
) -> GroupPlan:
    """What every process of a group holds; ``micro`` is the learner's micro-batch, ``ranks`` those of trained roles."""
    from rlhf_t2i import activations

    settings = recipe.optimisation
    width = _BYTES[settings.precision]
    unet = parts["unet"] or 0
    # Several servers share a micro-batch; a server of several learner ranks keeps the graphs of all, but a reward call
    # is over when it returns.
    images = -(-micro * ranks["learner"] // devices)
    scored = min(micro, images)
    saved = activations.of_recipe(
        networks.unet, networks.vae, networks.latents[1], settings.precision, recipe.models.vae_precision
    )

    def kept(kind: str, role: str) -> int:
        item = saved.get(kind)
        return 0 if item is None else (item.checkpointed if settings.checkpoints(role) else item.plain)

    plans = []
    needs_vjp = recipe.algorithm.divergence.name != "kl"
    for role in roles:
        if role in TRAINED:
            # The assistant trains on micro-batches of its own, and serves the learner's.
            batch = micro if role == "learner" else max(images, settings.micro_batch or settings.batch_size // devices)
            memory = _trained(recipe, role, unet, devices, networks, batch * kept("train", role))
            if role == "learner" and settings.ema is not None:
                memory = replace(memory, host=memory.host + 4 * unet)
            plans.append(RolePlan(role, unet or None, memory))
        elif role == "generator":
            shared = "learner" in roles
            own = Memory() if shared else Memory(weights=4 * unet)
            plans.append(RolePlan(role, 0 if shared else unet or None, own))
        elif role == "reference":
            branches = 2 if recipe.algorithm.cfg.scale not in (0, 1) and recipe.algorithm.cfg.mode == "inner" else 1
            active = images * branches * kept("frozen", role) if needs_vjp else 0
            plans.append(RolePlan(role, unet or None, Memory(weights=width * unet, activations=active)))
    if any(r.role in ("learner", "generator", "assistant", "reference") for r in plans):
        text = parts["text encoders"]
        plans.append(RolePlan("text encoders", text, Memory(weights=width * (text or 0))))
    plans += _rewards(recipe, roles, networks, parts, scored * kept("decoder", "reward"), scored)
    return GroupPlan(name, devices, tuple(plans))


def _rewards(
    recipe: Recipe, roles: list[str], networks: Networks, parts: Mapping[str, int | None], decoding: int, images: int
) -> list[RolePlan]:
    """The VAE and the rewards of a process; rewards that name one model share it."""
    hosted = [role for role in roles if role.startswith("reward:")]
    if not hosted:
        return []
    from rlhf_t2i import activations

    vae = parts["vae"]
    held = Memory(weights=_BYTES[recipe.models.vae_precision] * (vae or 0), activations=decoding)
    plans = [RolePlan("reward: VAE", vae, held)]
    seen: set[str] = set()
    for role in hosted:
        where, config, counted = networks.rewards[role.partition(":")[2]]
        fresh = where not in seen
        seen.add(where)
        saved = activations.of_reward(config, recipe.optimisation.precision)
        kept = saved.checkpointed if recipe.optimisation.checkpoints("reward") else saved.plain
        weights = _BYTES[recipe.optimisation.precision] * (counted or 0) if fresh else 0
        plans.append(RolePlan(role, counted if fresh else 0, Memory(weights=weights, activations=images * kept)))
    return plans
