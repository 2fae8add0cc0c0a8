"""One process of a group: builds its roles, connects them to the others and answers calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch

from rlhf_t2i import plugins
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import flops, sources
from rlhf_t2i.families.base import Conditioner
from rlhf_t2i.plugins import registry, traits
from rlhf_t2i.plugins.base import Reward
from rlhf_t2i.recipe.schema import Recipe, RewardChoice
from rlhf_t2i.roles.assistant import AssistantRole
from rlhf_t2i.roles.context import RankContext, WorkerSpec
from rlhf_t2i.roles.dispatch import Client, Method, P, T
from rlhf_t2i.roles.generator import GeneratorRole
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.roles.local_calls import Background, LocalClient
from rlhf_t2i.roles.reference import ReferenceRole
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.roles.stopwatch import stopwatch
from rlhf_t2i.utils.device import default_device, move
from rlhf_t2i.utils.quiet import quietly

Role = LearnerRole | GeneratorRole | AssistantRole | ReferenceRole | RewardRole
IsolatedReward = Callable[[RewardChoice, torch.dtype], Reward]
"""Starts a reward in an environment of its own (``Reward.pip``) and returns its stand-in."""


@dataclass(frozen=True)
class Reading:
    """What a process has measured since its last reading.

    Attributes:
        seconds: By role.
        sent: Bytes to other processes.
        memory: Peak bytes: of the device on CUDA, else of the process.
        matmul_rate: FLOP/s of its own device, see :func:`rlhf_t2i.families.flops.matmul_rate`; None without one.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    sent: int = 0
    memory: int = 0
    matmul_rate: float | None = None


class Worker:
    """The roles of one process.

    Args:
        spec: What to build.
        isolated: Starts rewards with packages of their own; None where that is not possible.

    Raises:
        UsageError: A reward needs an environment of its own and ``isolated`` is None, or it cannot be built.
    """

    @quietly()
    def __init__(self, spec: WorkerSpec, isolated: IsolatedReward | None = None) -> None:
        self.spec, self._isolated = spec, isolated
        sources.use_revisions(spec.recipe.revisions)
        self.device = default_device()
        self._context = RankContext(spec, self.device)
        # Before the networks: afterwards there may be no room. Processes that share a GPU would measure each other.
        shared = spec.recipe.placement.share_devices
        self._matmul_rate = flops.matmul_rate() if self.device.type == "cuda" and not shared else None
        self.roles: dict[str, Role] = {}
        networks = [role for role in ("learner", "generator", "assistant", "reference") if role in spec.roles]
        if networks:
            # Now, not with the first prompt: damaged text encoders must stop a run before it has begun.
            self._load_text_encoders()
        for role in networks:
            self.roles[role] = self._build(role)
        choices = hosted_rewards(spec.recipe, spec.roles)
        if choices or "reward" in spec.roles:  # without rewards it still decodes previews
            self.roles["reward"] = self._build_rewards(choices)

    def _load_text_encoders(self) -> Conditioner:
        return self._context.store.conditioner

    def _build(self, role: str) -> Role:
        if role == "learner":
            return LearnerRole(self._context)
        if role == "generator":
            learner = self.roles.get("learner")
            return GeneratorRole(self._context, learner.engine.module if isinstance(learner, LearnerRole) else None)
        return AssistantRole(self._context) if role == "assistant" else ReferenceRole(self._context)

    def _build_rewards(self, choices: Sequence[RewardChoice]) -> RewardRole:
        with plugins.sharing():
            rewards = {choice.key: self._build_reward(choice) for choice in choices}
        trained = {choice.key for choice in self.spec.recipe.algorithm.rewards}
        return RewardRole(
            rewards,
            self._context.store.decoder,
            device=self._context.device,
            dtype=self._context.dtype,
            micro_batch={choice.key: choice.micro_batch for choice in choices},
            timeouts=self.spec.timeouts(choices),
            failures_dir=self.spec.failures,
            activation_checkpointing=self.spec.recipe.optimization.checkpoints("reward"),
            trained=[key for key in rewards if key in trained],
        )

    def _build_reward(self, choice: RewardChoice) -> Reward:
        packages = traits.resolve(self.spec.recipe).reward(choice.key).plugin.pip
        if not packages:
            return registry.reward(choice.name, **choice.options)
        if self._isolated is None:
            raise UsageError(
                f"reward {choice.name!r} needs an environment of its own ({', '.join(packages)}): use placement: ray"
            )
        return self._isolated(choice, self._context.dtype)

    def connect(self, remote: Mapping[str, Sequence[Client]]) -> None:
        """Tell the trained roles where the others are.

        Args:
            remote: Clients of the roles in other processes, by role; rewards may have several. A role of this process
                is called directly.
        """
        # With the denoisers elsewhere there is time to compute rewards here while they work.
        background = Background() if {"assistant", "reference"} & remote.keys() else None

        def clients(role: str) -> list[Client]:
            own = [LocalClient(role, self.roles[role], background)] if role in self.roles else []
            return [*remote.get(role, ()), *own]

        for role in self.roles.values():
            if isinstance(role, AssistantRole):
                role.connect(*clients("generator"))
            elif isinstance(role, LearnerRole):
                (assistant,), (reference,) = clients("assistant"), clients("reference")
                role.connect(assistant, reference, clients("reward"))

    def call(self, role: str, method: Method[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a role's method; tensors come to this process's device and leave on the CPU."""
        moved, named = move(args, self.device), move(kwargs, self.device)
        with stopwatch.span(role):
            result = getattr(self.roles[role], method.__name__)(*moved, **named)
        return cast(T, move(result, torch.device("cpu")))

    def reading(self) -> Reading:
        """What this process has measured since its last reading."""
        return Reading(*stopwatch.read(), _peak_memory(), self._matmul_rate)


def hosted_rewards(recipe: Recipe, roles: Sequence[str]) -> list[RewardChoice]:
    """The rewards of a group with these roles: those placed by label, and with ``reward`` all that are not placed.

    Latent rewards belong to no group: the learner computes them, beside its client of the reference.
    """
    named = {role.partition(":")[2] for role in roles if role.startswith("reward:")}
    elsewhere = {
        role.partition(":")[2]
        for group in recipe.placement.groups.values()
        for role in group.roles
        if role.startswith("reward:")
    }
    chosen = []
    for choice in [*recipe.algorithm.rewards, *recipe.algorithm.eval_rewards]:
        if choice.key in named or ("reward" in roles and choice.key not in elsewhere):
            chosen.append(choice)
    return [choice for choice in chosen if not traits.resolve(recipe).reward(choice.key).on_latents]


def _peak_memory() -> int:
    """Peak bytes: of the device on CUDA, else of the process."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return int(peak)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def set_threads(threads: int | None) -> None:
    """Bound the process's CPU threads; several processes spinning on all cores slow each other down."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def fair_threads(processes: int) -> int:
    """This node's cores, divided by the number of a run's processes on it."""
    return max(1, len(os.sched_getaffinity(0)) // processes)
