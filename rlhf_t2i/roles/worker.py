"""One process of a group: builds its roles, connects them to the others and answers calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_t2i import plugins
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import flops, sources
from rlhf_t2i.families.base import Conditioner
from rlhf_t2i.plugins import registry, traits
from rlhf_t2i.plugins.base import Reward
from rlhf_t2i.recipe.schema import Recipe, RewardChoice
from rlhf_t2i.roles.assistant import AssistantRole
from rlhf_t2i.roles.context import RankContext
from rlhf_t2i.roles.dispatch import Client
from rlhf_t2i.roles.generator import GeneratorRole
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.roles.local_calls import Background, LocalClient
from rlhf_t2i.roles.reference import ReferenceRole
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.roles.stopwatch import stopwatch
from rlhf_t2i.utils.device import default_device, move
from rlhf_t2i.utils.quiet import quietly

IsolatedReward = Callable[[RewardChoice, torch.dtype], Reward]
"""Starts a reward in an environment of its own (``Reward.pip``) and returns its stand-in."""


@dataclass(frozen=True)
class WorkerSpec:
    """What a process must know to build itself.

    Attributes:
        recipe: The whole recipe.
        group: Its group's name.
        roles: The roles it holds; ``reward:LABEL`` for one reward.
        rank: Its rank in the group.
        world: Processes in the group.
        threads: CPU threads; None: a fair share of the node's cores over Ray, torch's choice in ``placement: local``.
        neighbors: Processes of the run on the same node, this one included.
        distributed: Whether trained roles use DeepSpeed.
        failures: Where a failing sample is saved.
    """

    recipe: Recipe
    group: str
    roles: tuple[str, ...]
    rank: int = 0
    world: int = 1
    threads: int | None = None
    neighbors: int = 1
    distributed: bool = False
    failures: Path | None = None

    @property
    def trains(self) -> bool:
        """Whether a role of this process has an optimizer."""
        return bool({"learner", "assistant"} & set(self.roles))


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
        self._context = RankContext(spec.recipe, spec.rank, spec.world, self.device, spec.distributed, spec.failures)
        # Before the networks: afterwards there may be no room. Processes that share a GPU would measure each other.
        shared = spec.recipe.placement.share_devices
        self._matmul_rate = flops.matmul_rate() if self.device.type == "cuda" and not shared else None
        self.roles: dict[str, Any] = {}
        networks = [role for role in ("learner", "generator", "assistant", "reference") if role in spec.roles]
        if networks:
            # Now, not with the first prompt: damaged text encoders must stop a run before it has begun.
            self._load_text_encoders()
        for role in networks:
            self.roles[role] = self._build(role)
        self._context.store.forget_bases()
        choices = hosted_rewards(spec.recipe, spec.roles)
        if choices or "reward" in spec.roles:  # without rewards it still decodes previews
            self.roles["reward"] = self._build_rewards(choices)

    def _load_text_encoders(self) -> Conditioner:
        return self._context.store.conditioner

    def _build(self, role: str) -> Any:
        if role == "learner":
            return LearnerRole(self._context)
        if role == "generator":
            learner = self.roles.get("learner")
            return GeneratorRole(self._context, None if learner is None else learner.engine.module)
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
            failures_dir=self.spec.failures,
            activation_checkpointing=self.spec.recipe.optimization.checkpoints("reward"),
            trained=[key for key in rewards if key in trained],
        )

    def _build_reward(self, choice: RewardChoice) -> Reward:
        packages = traits.resolve(self.spec.recipe).reward(choice.key).packages
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

        if "assistant" in self.roles:
            (generator,) = clients("generator")
            self.roles["assistant"].connect(generator)
        if "learner" in self.roles:
            (assistant,), (reference,) = clients("assistant"), clients("reference")
            self.roles["learner"].connect(assistant, reference, clients("reward"))

    def call(self, role: str, method: str, *args: Any) -> Any:
        """Call a role's method; tensors come to this process's device and leave on the CPU."""
        moved = [move(argument, self.device) for argument in args]
        with stopwatch.span(role):
            result = getattr(self.roles[role], method)(*moved)
        return move(result, torch.device("cpu"))

    def readings(self) -> dict[str, Any]:
        """Seconds by role, bytes sent, and peak memory in bytes since the last reading; the device's matmul rate."""
        seconds, sent = stopwatch.read()
        return {
            "seconds": seconds,
            "bytes": sent,
            "memory": _peak_memory(),
            "rank": self.spec.rank,
            "matmul_rate": self._matmul_rate,
        }


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
