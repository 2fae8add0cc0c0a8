"""Memory of a process by role and kind, before anything starts.

Parameters and activations are counted by running the networks on the meta device. The CUDA context, fragmentation and
library workspaces are not included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from rlhf_t2i.plugins import guard, traits
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning import graph, zero

if TYPE_CHECKING:
    from rlhf_t2i.families.counting import Network
    from rlhf_t2i.families.footprints import Footprints

TRAINED = ("learner", "assistant")


@dataclass(frozen=True)
class Memory:
    """Bytes in one process at its worst moment, by kind; ``host`` is in the machine's memory, not on the device.

    Attributes:
        weights: Stay.
        gradients: Wait for an update, or for the next micro-batch.
        optimizer: Stays; with the gradients and the bucket of ZeRO-3, which stay too.
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
        parameters: Of its networks; 0 where they are another role's, None where they are not known.
        memory: At its own worst moment.
        summed: Of its gradients, what waits while other roles work for its next micro-batch.
        measuring: Activations of a role that draws, decodes or scores between steps, without gradient.
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
        graph, and what it has summed, wait for the answers of rewards and of denoisers: in one process, one after the
        other. In a process of rewards and one denoiser, without the learner, the denoiser's graph waits while rewards
        are computed (:meth:`LearnerRole.connect`). Between steps images are drawn, then decoded and scored.
        """
        alone = [replace(r.memory, weights=0, optimizer=0, host=0) for r in self.roles if r.role in TRAINED]
        graph = Memory(
            gradients=sum(r.summed for r in self.roles if r.role == "learner"),
            activations=sum(r.memory.activations for r in self.roles if r.role == "learner"),
        )
        rewards = sum(r.memory.activations for r in self.roles if r.role.startswith(("reward", "decoder")))
        graphs = [r.memory.activations for r in self.roles if r.role in ("assistant", "reference")]
        late = len(graphs) == 1 and all(r.role != "learner" for r in self.roles)
        answers = rewards + sum(graphs) if late else max(rewards, sum(graphs))
        scoring = Memory(activations=sum(r.measuring for r in self.roles if r.role != "generator"))
        drawing = Memory(activations=sum(r.measuring for r in self.roles if r.role == "generator"))
        return [*alone, graph + Memory(activations=answers), scoring, drawing]


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


def zero_setting(recipe: Recipe, devices: int) -> zero.Setting:
    """How a network is trained in a group of so many devices."""
    from rlhf_t2i.engines.deepspeed import REDUCE_BUCKET

    settings = recipe.optimization
    return zero.Setting(
        ranks=devices,
        stage=settings.zero_stage if recipe.placement.mode == "ray" else None,
        precision=settings.precision,
        bucket=REDUCE_BUCKET,
        offload=settings.offload_optimizer,
        accumulates=settings.micro_batch is not None and settings.micro_batch * devices < settings.batch_size,
    )


@dataclass(frozen=True)
class _Group:
    """One group while it is planned: ``micro`` is the learner's micro-batch, ``ranks`` are the learner's."""

    recipe: Recipe
    devices: int
    roles: tuple[str, ...]
    networks: Footprints
    micro: int
    ranks: int

    @cached_property
    def _bases(self) -> dict[tuple[object, int], set[bool]]:
        """By place and bytes per number, whether a frozen network or one with adapters was planned on it already."""
        return {}

    @cached_property
    def images(self) -> int:
        """Per process and call: several servers share a micro-batch; one of several learner ranks has all of theirs."""
        return -(-self.micro * self.ranks // self.devices)

    @cached_property
    def drawn(self) -> int:
        """Images per process that are drawn and scored at once between steps, or drawn for a lesson."""
        lessons = [schedule.images for schedule in traits.resolve(self.recipe).online.values()]
        return -(-max([self.recipe.evaluation.batch_size, *lessons]) // self.devices)

    @property
    def width(self) -> int:
        """Bytes of a number in the compute precision."""
        return zero.BYTES[self.recipe.optimization.precision]

    @property
    def _draws_ahead(self) -> bool:
        """Whether the learner draws a micro-batch while denoisers elsewhere work on the last one."""
        settings = self.recipe.optimization
        apart = not {"assistant", "reference"} <= set(self.roles)
        several = self.micro * self.ranks < settings.batch_size
        return apart and several and graph.NOW.under(settings.zero_stage).next_micro_batch

    def recomputed(self, role: str) -> bool:
        return self.recipe.optimization.checkpoints(role)

    def plans(self) -> list[RolePlan]:
        make = {"learner": self._trained, "assistant": self._trained, "generator": self._generator}
        make["reference"] = self._reference
        plans = [make[role](role) for role in self.roles if role in make]
        if plans and self.recipe.models.embeddings is None:
            text = self.networks.text_encoders().parameters()
            plans.append(RolePlan("text encoders", text, Memory(weights=self.width * text)))
        return plans + self._rewards()

    def _trained(self, role: str) -> RolePlan:
        """A trained role: its network, or its adapters beside the frozen network."""
        settings = self.recipe.optimization
        optimizer = settings.generator if role == "learner" else settings.assistant
        network, whole = self.networks.network(optimizer.lora), self.networks.network().parameters()
        sizes, setting = zero.sizes_of(network.sizes()), zero_setting(self.recipe, self.devices)
        # The assistant trains on micro-batches of its own, and serves the learner's.
        own = settings.micro_batch or settings.batch_size // self.devices
        batch = self.micro if role == "learner" else max(self.images, own)
        graphs = 2 if role == "learner" and self._draws_ahead else 1
        kept = graphs * batch * network.activations("train", self.recomputed(role))
        memory = trained_memory(sizes, setting, kept)
        if optimizer.kind == "adamw_8bit":
            # Both moments take a byte instead of four; their scales, one number in 256, are left out.
            share = -(-sizes.total // (self.devices if setting.stage else 1))
            memory = replace(memory, optimizer=memory.optimizer - 6 * share)
        if optimizer.lora is not None:
            width = 4 if setting.stage is None else self.width
            memory = replace(memory, weights=memory.weights + width * self._held(role, width))
        if role == "learner" and settings.ema is not None:  # rank 0 averages on the host
            memory = replace(memory, host=memory.host + 4 * whole)
        return RolePlan(role, whole, memory, zero.total(zero.terms(sizes, setting), "summed"))

    def _generator(self, role: str) -> RolePlan:
        """float32 weights of its own where the learner is elsewhere, and of the average once it is sampled."""
        network = self.networks.network()
        copies = int("learner" not in self.roles) + int(self.recipe.optimization.ema is not None)
        held, drawing = copies * network.parameters(), network.activations("forward")
        return RolePlan(role, held, Memory(weights=4 * held), measuring=self.drawn * drawing)

    def _reference(self, role: str) -> RolePlan:
        from rlhf_t2i.families import flops

        network, branches = self.networks.network(), flops.guided_branches(self.recipe.algorithm.cfg)
        kept = 0
        if traits.resolve(self.recipe).divergence.needs_vjp:
            kept = self.images * branches * network.activations("input", self.recomputed(role))
        held = self.width * self._held(role, self.width)
        return RolePlan(role, network.parameters(), Memory(weights=held, activations=kept))

    def _held(self, role: str, width: int) -> int:
        """Numbers of a frozen base that this role adds to the process: roles that start from one place share it.

        The reference's convolutions have an order of their own in memory.
        """
        network, frozen = self.networks.network(), role == "reference"
        holders = self._bases.setdefault((self.networks.place(role), width), set())
        added = network.parameters() if not holders else 0 if frozen in holders else network.reordered()
        holders.add(frozen)
        return added

    def _rewards(self) -> list[RolePlan]:
        """The decoder and the rewards of a process; rewards that name one model share it.

        One decoding serves all of them, so the smallest of their own micro-batches bounds it. A reward call is over
        when it returns; rewards that only measure keep no graph.
        """
        labels = [role.partition(":")[2] for role in self.roles if role.startswith("reward:")]
        hosted = [label for label in labels if label in self.networks.rewards]
        if not hosted and "reward" not in self.roles:
            return []
        algorithm = self.recipe.algorithm
        on_images = {reward.key for reward in traits.resolve(self.recipe).trained_on_images}
        trained = [choice for choice in algorithm.rewards if choice.key in hosted and choice.key in on_images]
        measured = [choice for choice in (*algorithm.rewards, *algorithm.eval_rewards) if choice.key in hosted]
        batch = min(self.micro, self.images) if trained else 0
        learned = min([batch, *(choice.micro_batch for choice in trained if choice.micro_batch)])
        shown = min([self.drawn, *(choice.micro_batch for choice in measured if choice.micro_batch)])

        lessons = traits.resolve(self.recipe).online

        def plan(role: str, network: Network | None, width: int, images: int, fresh: bool = True) -> RolePlan:
            if network is None:
                return RolePlan(role, None, Memory())
            kept = images * network.activations("input", self.recomputed("reward")) if images else 0
            held = network.parameters() if fresh else 0
            lesson = lessons.get(role.partition(":")[2])  # its images are seen at once
            measuring = max(shown, 0 if lesson is None else lesson.images) * network.activations("forward")
            return RolePlan(role, held, Memory(weights=width * held, activations=kept), measuring=measuring)

        plans = [plan("decoder", self.networks.decoder(), self._decoder_width, learned)]
        seen: set[str] = set()
        for label in hosted:
            weights, network = self.networks.rewards[label]
            trains = label in [choice.key for choice in trained]
            with guard.building(f"reward {label!r}: its footprint cannot be measured"):
                plans.append(plan(f"reward:{label}", network, self.width, learned * trains, weights not in seen))
            seen.add(weights)
        return plans

    @property
    def _decoder_width(self) -> int:
        return 2 if self.recipe.models.vae_precision == "bf16" else 4


def group_plan(
    recipe: Recipe, name: str, devices: int, roles: list[str], networks: Footprints, micro: int, ranks: int
) -> GroupPlan:
    """What every process of a group holds.

    Args:
        recipe: The recipe.
        name: The group's.
        devices: Its processes.
        roles: Of the group: ``reward:LABEL`` for each reward, ``reward`` where previews are decoded.
        networks: Of the recipe.
        micro: The learner's micro-batch.
        ranks: The learner's processes.
    """
    return GroupPlan(name, devices, tuple(_Group(recipe, devices, tuple(roles), networks, micro, ranks).plans()))
