"""One process of a group: builds its roles, connects them to the others and answers calls. No Ray in here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_t2i import plugins
from rlhf_t2i.algorithm import rng
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import flops, sources
from rlhf_t2i.plugins import registry
from rlhf_t2i.plugins.base import LatentReward
from rlhf_t2i.recipe.schema import Recipe, RewardChoice
from rlhf_t2i.roles.assistant import AssistantRole
from rlhf_t2i.roles.context import RankContext
from rlhf_t2i.roles.denoiser import Deferred, DenoiserServer, Future
from rlhf_t2i.roles.generator import GeneratorRole
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.roles.reference import ReferenceRole
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.roles.stopwatch import stopwatch
from rlhf_t2i.utils.device import default_device
from rlhf_t2i.utils.quiet import quietly


@dataclass(frozen=True)
class WorkerSpec:
    """What a process must know to build itself.

    Attributes:
        recipe: The whole recipe.
        group: Its group's name.
        roles: The roles it holds; ``reward:LABEL`` for one reward.
        rank: Its rank in the group.
        world: Processes in the group.
        threads: CPU threads; None leaves torch's choice.
        distributed: Whether trained roles use DeepSpeed.
        failures: Where a failing sample is saved.
    """

    recipe: Recipe
    group: str
    roles: tuple[str, ...]
    rank: int = 0
    world: int = 1
    threads: int | None = None
    distributed: bool = False
    failures: Path | None = None

    @property
    def trains(self) -> bool:
        """Whether a role of this process has an optimizer."""
        return bool({"learner", "assistant"} & set(self.roles))


class Worker:
    """The roles of one process."""

    @quietly()
    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        sources.use_revisions(spec.recipe.revisions)
        self.device = default_device()
        self._context = RankContext(spec.recipe, spec.rank, spec.world, self.device, spec.distributed, spec.failures)
        # Before the networks: afterwards there may be no room. Processes that share a GPU would measure each other.
        shared = spec.recipe.placement.share_devices
        self._matmul_rate = flops.matmul_rate() if self.device.type == "cuda" and not shared else None
        self.roles: dict[str, Any] = {}
        for role in ("learner", "generator", "assistant", "reference"):
            if role in spec.roles:
                self.roles[role] = self._build(role)
        choices = hosted_rewards(spec.recipe, spec.roles)
        if choices or "reward" in spec.roles:  # without rewards it still decodes previews
            self.roles["reward"] = self._build_rewards(choices)

    def _build(self, role: str) -> Any:
        if role == "learner":
            return LearnerRole(self._context)
        if role == "generator":
            learner = self.roles.get("learner")
            return GeneratorRole(self._context, None if learner is None else learner.engine.module)
        return AssistantRole(self._context) if role == "assistant" else ReferenceRole(self._context)

    def _build_rewards(self, choices: Sequence[RewardChoice]) -> LocalRewards:
        with plugins.sharing():
            rewards = {choice.key: self._build_reward(choice) for choice in choices}
        trained = {choice.key for choice in self.spec.recipe.algorithm.rewards}
        role = RewardRole(
            rewards,
            self._context.store.decoder,
            device=self._context.device,
            dtype=self._context.dtype,
            micro_batch={choice.key: choice.micro_batch for choice in choices},
            failures_dir=self.spec.failures,
            activation_checkpointing=self.spec.recipe.optimization.checkpoints("reward"),
        )
        return LocalRewards(role, [choice.key for choice in choices if choice.key in trained])

    def _build_reward(self, choice: RewardChoice) -> Any:
        if not registry.load_class(registry.REWARDS, choice.name).pip:
            return registry.reward(choice.name, **choice.options)
        # Only a reward with packages of its own needs Ray, and only here.
        from rlhf_t2i.cluster.isolated import build_reward

        return build_reward(choice.name, choice.options, self._context.dtype, choice.timeout_s)

    def connect(self, clients: Mapping[str, Any]) -> None:
        """Tell the trained roles where the others are.

        Args:
            clients: Remote clients by role (``rewards`` is a list of reward clients); a role of this process is
                called directly and needs none.
        """
        if "assistant" in self.roles:
            own = self.roles.get("generator")
            generator = LocalCalls("generator", own) if own else clients["generator"]
            self.roles["assistant"].connect(generator)
        if "learner" in self.roles:
            denoisers = []
            for role in ("assistant", "reference"):
                own = self.roles.get(role)
                denoisers.append(LocalCalls(role, own) if own else clients[role])
            rewards = list(clients.get("rewards", []))
            if "reward" in self.roles:
                rewards.append(LocalCalls("reward", self.roles["reward"]))
            self.roles["learner"].connect(denoisers[0], denoisers[1], rewards)

    def call(self, role: str, method: str, *args: Any) -> Any:
        """Call a role's method; tensors come to this process's device and leave on the CPU."""
        moved = [_to(argument, self.device) for argument in args]
        with stopwatch.span(role):
            result = getattr(self.roles[role], method)(*moved)
        return _to(result, torch.device("cpu"))

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


@dataclass
class LocalCalls:
    """The client of a role in the same process: plain calls, made when the result is asked for."""

    role: str
    target: Any = field(repr=False)

    def _defer(self, method: str, *args: Any) -> Future:
        def call() -> Any:
            with stopwatch.span(self.role):
                return getattr(self.target, method)(*args)

        return Deferred(call)

    def submit_forward(self, *args: Any) -> Future:
        """See :class:`rlhf_t2i.roles.denoiser.DenoiserClient`."""
        assert isinstance(self.target, DenoiserServer)
        return self._defer("forward", *args)

    def submit_vjp(self, *args: Any) -> Future:
        """See :class:`rlhf_t2i.roles.denoiser.DenoiserClient`."""
        return self._defer("vjp", *args)

    def submit_sample(self, prompts: Sequence[str], keys: Sequence[rng.Key], weights: str) -> Future:
        """See :class:`rlhf_t2i.roles.generator.GeneratorClient`."""
        return self._defer("sample", prompts, keys, weights)

    def submit_value_and_grad(self, latents: Tensor, prompts: Sequence[str]) -> Future:
        """See :class:`rlhf_t2i.roles.learner.RewardClient`."""
        return self._defer("value_and_grad", latents, prompts)


@dataclass
class LocalRewards:
    """The rewards of one process: those that train for the learner, all of them for measuring."""

    role: RewardRole
    trained: list[str]

    def value_and_grad(self, latents: Tensor, prompts: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Values and gradients of the rewards that train."""
        return self.role.value_and_grad(latents, prompts, self.trained) if self.trained else {}

    def score(self, latents: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Values of all rewards."""
        return self.role.score_latents(latents, prompts)

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1]."""
        return self.role.decode(latents)


def hosted_rewards(recipe: Recipe, roles: Sequence[str]) -> list[RewardChoice]:
    """The rewards a group with these roles hosts: those placed by label, and with ``reward`` the unplaced rest.

    Latent rewards are no one's: they live beside the learner's client of the reference.
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
            cls = registry.load_class(registry.REWARDS, choice.name)
            if not issubclass(cls, LatentReward):
                chosen.append(choice)
    return chosen


def check_plugins(recipe: Recipe) -> None:
    """Refuse, before anything starts, plugins that cannot be imported, wrong options and untrainable rewards.

    Raises:
        UsageError: One sentence naming the plugin and the key.
    """
    choice = recipe.algorithm.divergence
    cls: Any = registry.load_class(registry.DIVERGENCES, choice.name)
    registry.parse_options(cls, "divergence", choice.name, choice.options)
    for kind, rewards in (("rewards", recipe.algorithm.rewards), ("eval_rewards", recipe.algorithm.eval_rewards)):
        for reward in rewards:
            cls = registry.load_class(registry.REWARDS, reward.name)
            registry.parse_options(cls, "reward", reward.name, reward.options)
            if kind == "rewards" and not cls.differentiable:
                raise UsageError(
                    f"algorithm.rewards: {reward.name!r} has no gradient, so it cannot train: move it to eval_rewards"
                )
            if kind == "eval_rewards" and issubclass(cls, LatentReward):
                raise UsageError(
                    f"algorithm.eval_rewards: {reward.name!r} is computed on latents beside the learner: "
                    "it can train, but not be measured here"
                )


def _to(value: Any, device: torch.device) -> Any:
    """Tensors inside lists, tuples and dictionaries, moved."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to(item, device) for item in value)
    return value


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
