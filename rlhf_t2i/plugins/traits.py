"""Traits of the plugins a recipe names: resolved once, so that no other module asks for a plugin's name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins import guard, registry
from rlhf_t2i.plugins.base import Divergence, Footprint, LatentReward, Options, Reward
from rlhf_t2i.plugins.online import OnlineReward, Schedule
from rlhf_t2i.recipe.mistakes import KeyPath
from rlhf_t2i.recipe.placement import check_placement
from rlhf_t2i.recipe.schema import Recipe, RewardChoice

_CACHED = 64


@dataclass(frozen=True)
class DivergenceTraits:
    """Traits of the divergence.

    Attributes:
        name: As in the recipe.
        needs_vjp: Whether the generator's gradient flows through assistant and reference.
        order: The homogeneity degree of its distance.
        options: Validated.
        plugin: Its class.
    """

    name: str
    needs_vjp: bool
    order: int
    options: Options
    plugin: type[Divergence]


@dataclass(frozen=True)
class RewardTraits:
    """Traits of one reward of a recipe.

    Attributes:
        key: Its label in metrics.
        name: As in the recipe.
        trains: Whether it is among ``algorithm.rewards``.
        unit: Of its value.
        options: Validated.
        plugin: Its class, whose attributes are its other traits.
    """

    key: str
    name: str
    trains: bool
    unit: str
    options: Options
    plugin: type[Reward]

    @property
    def on_latents(self) -> bool:
        """Whether it scores latents, beside the learner, instead of decoded images."""
        return issubclass(self.plugin, LatentReward)

    @property
    def schedule(self) -> Schedule | None:
        """How many samples it learns from while the generator trains; None of a reward that does not learn."""
        return self.plugin.schedule(self.options) if issubclass(self.plugin, OnlineReward) else None

    @property
    def reference_calls(self) -> int:
        """Calls of the reference per score, two predictions each; 0 for a reward on images."""
        return self.plugin.reference_calls if issubclass(self.plugin, LatentReward) else 0

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value is better."""
        return self.plugin.higher_is_better

    @property
    def compares(self) -> bool:
        """Whether a call needs at least two images of each prompt."""
        with guard.building(f"reward {self.name!r}: whether it compares images cannot be told", self.plugin):
            return self.plugin.compares(self.options)

    @property
    def scores_any_prompt(self) -> bool:
        """Whether there is nothing to ask :meth:`refuse_prompts` for."""
        own, default = (getattr(cls.refuse_prompts, "__func__", None) for cls in (self.plugin, Reward))
        return own is default

    def refuse_prompts(self, prompts: Iterable[str]) -> str | None:
        """Why the first of the prompts that it cannot score cannot be; None where it can score all."""
        with guard.building(f"reward {self.name!r}: which prompts it scores cannot be told", self.plugin):
            return self.plugin.refuse_prompts(self.options, prompts)

    @cached_property
    def footprint(self) -> Footprint | None:
        """Its network, for planning; None where it is not known. May read local configuration files.

        Raises:
            UsageError: A file is missing or damaged.
        """
        with guard.building(f"reward {self.name!r}: its footprint cannot be told", self.plugin):
            return self.plugin.footprint(self.options)

    def hub_models(self) -> list[str]:
        """Hub ids that it may load."""
        with guard.building(f"reward {self.name!r}: its hub_models cannot be told", self.plugin):
            return self.plugin.hub_models(self.options)


@dataclass(frozen=True)
class Traits:
    """Traits of a recipe's divergence and rewards; the trained rewards come first."""

    divergence: DivergenceTraits
    rewards: tuple[RewardTraits, ...]

    @property
    def trained(self) -> tuple[RewardTraits, ...]:
        """The rewards that train."""
        return tuple(reward for reward in self.rewards if reward.trains)

    @property
    def online(self) -> dict[str, Schedule]:
        """The schedules of the rewards that learn while the generator trains, by label."""
        return {reward.key: reward.schedule for reward in self.rewards if reward.schedule is not None}

    @property
    def trained_on_images(self) -> tuple[RewardTraits, ...]:
        """The rewards that train on decoded images."""
        return tuple(reward for reward in self.trained if not reward.on_latents)

    @property
    def reference_calls(self) -> int:
        """Calls of the reference by all trained rewards on latents, per image of a generator update."""
        return sum(reward.reference_calls for reward in self.trained)

    def preflight(self) -> None:
        """Build the divergence; refuse rewards whose packages are missing, and what their own ``preflight`` refuses.

        Raises:
            UsageError: One sentence naming the plugin and what is missing.
        """
        registry.build_divergence(self.divergence.plugin, self.divergence.name, self.divergence.options)
        for reward in self.rewards:
            registry.check_packages(reward.plugin, reward.name)
            with guard.building(f"reward {reward.name!r} cannot be used", reward.plugin):
                reward.plugin.preflight(reward.options)

    def reward(self, key: str) -> RewardTraits:
        """The traits of a reward by its label."""
        return next(reward for reward in self.rewards if reward.key == key)


_resolved: dict[str, Traits] = {}  # by the JSON of recipe.algorithm: every step asks for the traits again


def resolve(recipe: Recipe) -> Traits:
    """Import the plugins of a recipe, validate their options and collect their traits.

    Raises:
        UsageError: An unknown plugin, one that cannot be imported, a wrong option, a reward that cannot train among
            ``rewards``, or one that cannot be measured among ``eval_rewards``.
    """
    key = recipe.algorithm.model_dump_json()
    if key not in _resolved:
        while len(_resolved) >= _CACHED:
            _resolved.pop(next(iter(_resolved)))
        _resolved[key] = _resolve(recipe)
    return _resolved[key]


def _resolve(recipe: Recipe) -> Traits:
    algorithm, section = recipe.algorithm, ("algorithm", "divergence")
    choice = algorithm.divergence
    with _at(recipe, (*section, "name")):
        cls = registry.load_class(registry.DIVERGENCES, choice.name)
    place = f"algorithm.divergence: divergence {choice.name!r}"
    options = registry.parse_options(cls, place, choice.options, lambda key: recipe.where((*section, "options", *key)))
    rewards = [_reward(recipe, choice, ("algorithm", "rewards", i)) for i, choice in enumerate(algorithm.rewards)]
    rewards += [
        _reward(recipe, choice, ("algorithm", "eval_rewards", i)) for i, choice in enumerate(algorithm.eval_rewards)
    ]
    return Traits(DivergenceTraits(choice.name, cls.needs_vjp, cls.order, options, cls), tuple(rewards))


@contextmanager
def _at(recipe: Recipe, key: KeyPath) -> Iterator[None]:
    """Begin an error message in the block with the place of a key in the recipe."""
    try:
        yield
    except UsageError as error:
        error.args = (f"{recipe.where(key)}: {error}",)
        raise


def _reward(recipe: Recipe, choice: RewardChoice, section: KeyPath) -> RewardTraits:
    key, trains = ".".join(map(str, section)), section[1] == "rewards"
    with _at(recipe, (*section, "name")):
        cls = registry.load_class(registry.REWARDS, choice.name)
        if trains and not cls.differentiable:
            raise UsageError(
                f"algorithm.rewards: {choice.name!r} has no gradient: put it into eval_rewards, or let a "
                "surrogate learn it (docs/rewards.md, Without a gradient)"
            )
        if issubclass(cls, LatentReward) and not trains:
            raise UsageError(
                f"algorithm.eval_rewards: {choice.name!r} is computed on latents beside the learner: "
                "it can train, but not be measured here"
            )
        if issubclass(cls, OnlineReward):
            _check_online(choice, cls, trains)
    place = f"{key}: reward {choice.name!r}"
    options = registry.parse_options(
        cls, place, choice.options, lambda name: recipe.where((*section, "options", *name))
    )
    with guard.building(f"{key}: reward {choice.name!r}: its unit cannot be told", cls):
        unit = cls.unit_of(options)
    return RewardTraits(choice.key, choice.name, trains, unit, options, cls)


def _check_online(choice: RewardChoice, cls: type[Reward], trains: bool) -> None:
    """Refuse a reward that learns where it cannot."""
    if not trains:
        raise UsageError(
            f"algorithm.eval_rewards: {choice.name!r} learns while it trains: put the scorer itself into eval_rewards"
        )
    if cls.pip:
        raise UsageError(f"algorithm.rewards: {choice.name!r} learns, and cannot have an environment of its own (pip)")


def check_online_placement(recipe: Recipe) -> None:
    """Refuse a placement that puts a reward that learns into several processes: each would learn something else.

    Raises:
        UsageError: Names the reward, its group and the fix.
    """
    for key in resolve(recipe).online:
        group, devices = check_placement(recipe)[f"reward:{key}"]
        if devices > 1:
            raise UsageError(
                f"placement.groups.{group}.devices: {devices}, but reward {key!r} learns and needs a group of one "
                f"device: add a group with the role reward:{key}"
            )
