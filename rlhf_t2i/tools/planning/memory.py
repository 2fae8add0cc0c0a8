"""Memory of a process by role and kind, before anything starts.

Parameters are counted on the meta device from configurations, activations by letting shapes flow through the networks
there. The CUDA context, fragmentation and library workspaces are not included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlhf_t2i.plugins import traits
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning import zero
from rlhf_t2i.tools.planning.networks import Networks, adapter_sizes, parameter_sizes

if TYPE_CHECKING:
    from rlhf_t2i.families.activations import Peak

TRAINED = ("learner", "assistant")


@dataclass(frozen=True)
class Memory:
    """Bytes in one process at its worst moment, by kind; ``host`` is in the machine's memory, not on the device.

    Attributes:
        weights: Stay.
        gradients: Wait for an update, or for the next micro-batch.
        optimizer: Stays; ZeRO-3's gradients and bucket are among it, since they do, too.
        activations: Of a forward and its backward.
        buffers: What ZeRO borrows over gradients and activations (:mod:`rlhf_t2i.tools.planning.zero`).
        host: Stays.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    buffers: int = 0
    host: int = 0

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(getattr(self, kind) + getattr(other, kind) for kind in Memory.__dataclass_fields__))


@dataclass(frozen=True)
class RolePlan:
    """One role of a group: its parameters and what they cost in one process.

    Attributes:
        role: Its name.
        parameters: Of its networks; 0 where they are another role's.
        memory: At its own worst moment.
        summed: Of its gradients, what waits while other roles work for its next micro-batch.
        measuring: Activations of a reward or a decoder that measures between steps, without gradient.
    """

    role: str
    parameters: int | None
    memory: Memory
    summed: int = 0
    measuring: int = 0


@dataclass(frozen=True)
class GroupPlan:
    """A set of devices, one process each, and what every process holds."""

    name: str
    devices: int
    roles: tuple[RolePlan, ...]

    @property
    def memory(self) -> Memory:
        """A process at its worst moment: what stays of all roles, and the largest of the phases' needs."""
        stays = sum((replace(r.memory, gradients=0, activations=0, buffers=0) for r in self.roles), Memory())
        return stays + max(self._phases(), key=lambda phase: phase.device)

    def _phases(self) -> list[Memory]:
        """What is there for a while only, phase by phase.

        Both trained roles work by themselves once: the assistant in its own updates, when the learner has no gradient,
        and the learner in its backward and update, when the assistant has none. Before its backward the learner's
        graph, and what it has summed, wait for the answers of rewards and of denoisers, one after the other. Between
        steps held-out prompts are measured.
        """
        alone = [replace(r.memory, weights=0, optimizer=0, host=0) for r in self.roles if r.role in TRAINED]
        graph = Memory(
            gradients=sum(r.summed for r in self.roles if r.role == "learner"),
            activations=sum(r.memory.activations for r in self.roles if r.role == "learner"),
        )
        rewards = sum(r.memory.activations for r in self.roles if r.role.startswith("reward"))
        denoisers = sum(r.memory.activations for r in self.roles if r.role in ("assistant", "reference"))
        measuring = Memory(activations=sum(r.measuring for r in self.roles))
        return [*alone, graph + Memory(activations=max(rewards, denoisers)), measuring]


def trained_memory(sizes: zero.Sizes, setting: zero.Setting, activations: int = 0) -> Memory:
    """A trained network at its worst moment: beside its activations, or after them."""
    items = zero.terms(sizes, setting)
    waiting = zero.total(items, "waiting")
    after = max(zero.total(items, "reduction"), zero.total(items, "update"))
    peak = max(activations + zero.total(items, "backward"), after)
    return Memory(
        weights=zero.total(items, "weights"),
        gradients=waiting,
        optimizer=zero.total(items, "states"),
        activations=activations,
        buffers=peak - activations - waiting,
        host=zero.total(items, "host"),
    )


def _trained(recipe: Recipe, role: str, unet: int, devices: int, networks: Networks, activations: int) -> RolePlan:
    """A trained role: its network, or its adapters beside the frozen network."""
    from rlhf_t2i.engines.deepspeed import REDUCE_BUCKET

    settings = recipe.optimization
    distributed = recipe.placement.mode == "ray"
    optimizer = settings.generator if role == "learner" else settings.assistant
    adapters = optimizer.lora
    sizes = parameter_sizes(networks.unet) if adapters is None else adapter_sizes(networks.unet, adapters)
    setting = zero.Setting(
        ranks=devices,
        stage=settings.zero_stage if distributed else None,
        precision=settings.precision,
        bucket=REDUCE_BUCKET,
        offload=settings.offload_optimizer,
        accumulates=settings.micro_batch is not None and settings.micro_batch * devices < settings.batch_size,
    )
    memory = trained_memory(sizes, setting, activations)
    if optimizer.kind == "adamw_8bit":
        # Both moments take a byte instead of four; their scales, one number in 256, are left out.
        ranks = devices if setting.stage else 1
        memory = replace(memory, optimizer=memory.optimizer - 6 * -(-sizes.total // ranks))
    if adapters is not None:
        width = zero.BYTES[settings.precision] if distributed else 4
        memory = replace(memory, weights=memory.weights + width * unet)
    if role == "learner" and settings.ema is not None:
        memory = replace(memory, host=memory.host + 4 * unet)
    return RolePlan(role, unet or None, memory, zero.total(zero.terms(sizes, setting), "summed"))


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
    from rlhf_t2i.families import activations
    from rlhf_t2i.families.flops import guided_branches

    settings = recipe.optimization
    width = zero.BYTES[settings.precision]
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
    needs_vjp = traits.resolve(recipe).divergence.needs_vjp
    for role in roles:
        if role in TRAINED:
            # The assistant trains on micro-batches of its own, and serves the learner's.
            batch = micro if role == "learner" else max(images, settings.micro_batch or settings.batch_size // devices)
            plans.append(_trained(recipe, role, unet, devices, networks, batch * kept("train", role)))
        elif role == "generator":
            shared = "learner" in roles
            own = Memory() if shared else Memory(weights=4 * unet)
            plans.append(RolePlan(role, 0 if shared else unet or None, own))
        elif role == "reference":
            active = images * guided_branches(recipe.algorithm.cfg) * kept("frozen", role) if needs_vjp else 0
            plans.append(RolePlan(role, unet or None, Memory(weights=width * unet, activations=active)))
    if any(r.role in ("learner", "generator", "assistant", "reference") for r in plans):
        text = parts["text encoders"]
        plans.append(RolePlan("text encoders", text, Memory(weights=width * (text or 0))))
    plans += _rewards(recipe, roles, devices, networks, parts, saved.get("decoder"), scored)
    return GroupPlan(name, devices, tuple(plans))


def _rewards(
    recipe: Recipe,
    roles: list[str],
    devices: int,
    networks: Networks,
    parts: Mapping[str, int | None],
    decoder: Peak | None,
    images: int,
) -> list[RolePlan]:
    """The VAE and the rewards of a process; rewards that name one model share it.

    One decoding serves all of them, so the smallest of their own micro-batches bounds it. Those that only measure keep
    no graph.
    """
    hosted = [role.partition(":")[2] for role in roles if role.startswith("reward:")]
    if not hosted:
        return []
    from rlhf_t2i.families import activations

    algorithm, width = recipe.algorithm, zero.BYTES[recipe.optimization.precision]
    on_images = {reward.key for reward in traits.resolve(recipe).trained_on_images}
    trained = [choice for choice in algorithm.rewards if choice.key in hosted and choice.key in on_images]
    measured = [choice for choice in (*algorithm.rewards, *algorithm.eval_rewards) if choice.key in hosted]
    learned = min([images, *(choice.micro_batch for choice in trained if choice.micro_batch)]) if trained else 0
    drawn = -(-recipe.evaluation.batch_size // devices)
    shown = min([drawn, *(choice.micro_batch for choice in measured if choice.micro_batch)])

    def plan(role: str, weights: int, counted: int | None, saved: Peak | None, learned: int) -> RolePlan:
        saved = saved or activations.Peak(0, 0)
        kept = saved.checkpointed if recipe.optimization.checkpoints("reward") else saved.plain
        return RolePlan(role, counted, Memory(weights=weights, activations=learned * kept), 0, shown * saved.forward)

    vae = parts["vae"]
    plans = [plan("reward: VAE", zero.BYTES[recipe.models.vae_precision] * (vae or 0), vae, decoder, learned)]
    seen: set[str] = set()
    for label in hosted:
        footprint = networks.rewards[label]
        source = footprint.weights if footprint else label
        fresh = source not in seen
        seen.add(source)
        saved = activations.of_reward(footprint, recipe.optimization.precision, recipe.models.height or 1024)
        trains = label in [choice.key for choice in trained]
        role, held = f"reward:{label}", parts[f"reward:{label}"] if fresh else 0
        plans.append(plan(role, width * (held or 0), held, saved, learned if trains else 0))
    return plans
