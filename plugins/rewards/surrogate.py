"""A scorer without a gradient, learned while the generator trains: a small network on CLIP features of its pictures.

Before each update of the generator the scorer values a few fresh samples, some of each prompt. What the network says of
them before it has learned from them says whether its gradient can be trusted: if it orders a prompt's samples wrongly,
or values all of them too highly, the pull on the generator is scaled down, then paused. docs/rewards.md, "Without a
gradient"; measured in docs/black_box.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from rlhf_t2i_plugins.rewards.clip_model import check_clip, clip_footprint, load_clip
from rlhf_t2i_plugins.rewards.scorer_calls import ScorerCalls, check_cache
from rlhf_t2i_plugins.rewards.surrogate_model import Fit, Head, Replay, concordance
from torch import Tensor

from rlhf_t2i import plugins
from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins import registry
from rlhf_t2i.plugins.precision import without_autocast
from rlhf_t2i.utils import stats

_FEWEST_PAIRS = 16
_NEWEST = 32  # prompts over which the bias is measured: it must be noticed within a few lessons
_SURE = 2.0  # standard errors from which a bias counts


class Scorer(plugins.Options):
    """The wrapped reward."""

    name: str = Field(description="a reward's registered name, or path/to/file.py:Class")
    options: dict[str, Any] = Field(default_factory=dict, description="its options")

    def resolve(self) -> tuple[type[plugins.Reward], plugins.Options]:
        """Its class and validated options.

        Raises:
            UsageError: No such reward, a wrong option, or one that cannot be wrapped.
        """
        cls = registry.load_class(registry.REWARDS, self.name)
        reason = None
        if issubclass(cls, plugins.LatentReward):
            reason = "scores latents beside the learner"
        elif issubclass(cls, plugins.OnlineReward):
            reason = "learns itself"
        elif cls.pip:
            reason = f"needs an environment of its own ({', '.join(cls.pip)}): put it behind a server and use http"
        elif not cls.higher_is_better:
            reason = "is better when lower: wrap a reward that is its negative"
        if reason is not None:
            raise UsageError(f"reward 'surrogate' cannot wrap {self.name!r}, which {reason}")
        return cls, registry.parse_options(cls, f"reward 'surrogate': of {self.name!r}", self.options)


class SurrogateOptions(plugins.Options):
    """The scorer, its budget, and how it is learned."""

    of: Scorer = Field(description="the reward that is learned: {name: ..., options: {...}}")
    features: str = Field(
        "openai/clip-vit-large-patch14", description="frozen CLIP whose features are learned on: hub id or local folder"
    )
    prompts: int = Field(8, ge=1, le=4096, description="prompts per lesson; one lesson precedes each generator update")
    images_per_prompt: int = Field(
        2, ge=2, le=64, description="images of each: the scorer's budget per update is prompts x images_per_prompt"
    )
    warmup: int = Field(32, ge=1, le=100_000, description="lessons before the first generator update")
    batch: int | None = Field(
        None, ge=1, le=4096, description="images that scorer and features see at once; default: all"
    )
    cache: bool = Field(
        False, description="keep scores in ~/.cache/rlhf-t2i/scores.sqlite, for later runs and for repeated steps"
    )
    buffer: int = Field(4096, ge=1, le=10_000_000, description="prompts whose samples are kept to learn from")
    updates: int = Field(20, ge=1, le=100_000, description="optimizer updates per lesson")
    rows: int = Field(16, ge=1, le=4096, description="prompts per optimizer update")
    recent: int = Field(
        64, ge=1, le=10_000_000, description="newest prompts, from which half of those of an update are drawn"
    )
    width: int = Field(64, ge=1, le=8192, description="of the network's hidden layer")
    lr: float = Field(5e-4, gt=0, le=1, description="AdamW's learning rate")
    weight_decay: float = Field(1.0, ge=0, le=100, description="AdamW's")
    rank_weight: float = Field(1.0, ge=0, le=1e6, description="weight of the pairwise term beside the regression")
    noise: float = Field(0.5, ge=0, le=10, description="noise on the standardized features while learning")
    window: int = Field(
        128, ge=16, le=1_000_000, description="newest pairs of fresh samples, over which the order is compared"
    )
    pause_below: float = Field(-0.1, ge=-1, le=1, description="rank correlation at which the pull is paused")
    full_above: float = Field(0.1, ge=-1, le=1, description="rank correlation from which the pull is whole")

    @model_validator(mode="after")
    def _ordered(self) -> SurrogateOptions:
        if self.pause_below >= self.full_above:
            raise ValueError(f"pause_below {self.pause_below:g} must be less than full_above {self.full_above:g}")
        return self


class Surrogate(plugins.OnlineReward):
    """A learned stand-in for a reward without a gradient; its values are in the scorer's unit."""

    Options = SurrogateOptions
    options: SurrogateOptions
    license = "the scorer's, and that of the features"

    def __init__(self, options: SurrogateOptions | None = None) -> None:
        super().__init__(options)
        chosen = self.options
        self.clip = load_clip(chosen.features)
        self.scorer = registry.reward(chosen.of.name, **chosen.of.options)
        self.uses_prompt, self.value_range = self.scorer.uses_prompt, self.scorer.value_range
        self._calls = ScorerCalls(self.scorer, chosen.of.model_dump_json(), chosen.batch, chosen.cache)
        self.head = Head(self.clip.model.config.projection_dim, chosen.width)
        self._optimizer = torch.optim.AdamW(self.head.parameters(), chosen.lr, weight_decay=chosen.weight_decay)
        self._replay = Replay(chosen.buffer)
        self._fit = Fit(chosen.updates, chosen.rows, chosen.recent, chosen.rank_weight, chosen.noise)
        self._lessons, self._pairs, self.pull = 0, list[int](), 0.0
        self._errors: list[float] = []  # prediction minus value of the newest prompts, each the mean of its images

    @classmethod
    def preflight(cls, options: SurrogateOptions) -> None:
        """Refuse a scorer that cannot be wrapped or refuses itself, features of no CLIP, and a damaged cache."""
        scorer, parsed = options.of.resolve()
        registry.check_packages(scorer, options.of.name)
        scorer.preflight(parsed)
        if scorer.compares(parsed) and options.batch is not None and options.batch % options.images_per_prompt:
            raise UsageError(
                f"reward 'surrogate': {options.of.name!r} compares the images of a prompt: let batch ({options.batch}) "
                f"be a multiple of images_per_prompt ({options.images_per_prompt})"
            )
        check_clip(options.features)
        if options.cache:
            check_cache("reward 'surrogate': its cache")

    @classmethod
    def hub_models(cls, options: SurrogateOptions) -> list[str]:
        """The features' model, and the scorer's."""
        scorer, parsed = options.of.resolve()
        return [options.features, *scorer.hub_models(parsed)]

    @classmethod
    def unit_of(cls, options: SurrogateOptions) -> str:
        """The scorer's."""
        scorer, parsed = options.of.resolve()
        return scorer.unit_of(parsed)

    @classmethod
    def compares(cls, options: SurrogateOptions) -> bool:
        """Whether the scorer does."""
        scorer, parsed = options.of.resolve()
        return scorer.compares(parsed)

    @classmethod
    def refuse_prompts(cls, options: SurrogateOptions, prompts: Iterable[str]) -> str | None:
        """The scorer's reason."""
        scorer, parsed = options.of.resolve()
        return scorer.refuse_prompts(parsed, prompts)

    @classmethod
    def footprint(cls, options: SurrogateOptions) -> plugins.Footprint | None:
        """The CLIP that is differentiated; the scorer runs without a gradient."""
        return clip_footprint(options.features)

    @classmethod
    def schedule(cls, options: plugins.Options) -> plugins.Schedule:
        """See :meth:`rlhf_t2i.plugins.OnlineReward.schedule`."""
        assert isinstance(options, SurrogateOptions)
        return plugins.Schedule(options.prompts, options.images_per_prompt, options.warmup)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit text vectors [B, D]."""
        return self.clip.text_features(prompts)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Predicted values [B]; their gradient is scaled by :attr:`pull`, in [0, 1]."""
        features, words = self.clip.image_features(images), self.text_features(prompts)
        with without_autocast(images):
            value = self.head(features, words)
        return value.detach() + self.pull * (value - value.detach())

    def true_score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scorer's values [B]."""
        return self._calls.values(images, prompts)

    def learn(self, lesson: int, images: Tensor, prompts: Sequence[str], seed: int) -> plugins.Lesson:
        """One lesson; see :meth:`rlhf_t2i.plugins.OnlineReward.learn`.

        Raises:
            ValueError: The lesson is not the next one.
        """
        if lesson != self._lessons:
            raise ValueError(f"lesson {lesson} cannot follow {self._lessons} lessons")
        k, asked = self.options.images_per_prompt, self._calls.asked
        with torch.no_grad():
            parts = images.split(self.options.batch or len(images))
            features, words = torch.cat([self.clip.image_features(p) for p in parts]), self.text_features(prompts)
            found = self.head(features, words).reshape(-1, k)
        values = self._calls.values(images, prompts)
        if self.ready:
            self._pairs = [*self._pairs, *concordance(found, values.reshape(-1, k))][-self.options.window :]
            self._errors = [*self._errors, *(found - values.reshape(-1, k)).mean(1).tolist()][-_NEWEST:]
        self._replay.add(lesson, features.reshape(-1, k, features.shape[1]), values.reshape(-1, k), prompts[::k])
        texts = self.text_features(self._replay.prompts)
        self.head.set_statistics(self._replay.images.flatten(0, 1), texts, self._replay.values.flatten())
        self.head.requires_grad_(True)
        loss = self._fit.run(self.head, self._optimizer, self._replay, texts, seed)
        self.head.requires_grad_(False)
        self._lessons, self.ready = lesson + 1, True
        metrics = {"loss": loss, "scored": float(self._calls.asked - asked), "buffer": float(len(texts) * k)}
        warnings = self._set_pull(lesson)
        metrics["pull"] = self.pull
        return plugins.Lesson(float(values.mean()), metrics | self._agreement(), warnings)

    def _agreement(self) -> dict[str, float]:
        measured = {} if not self._pairs else {"rank_correlation": sum(self._pairs) / len(self._pairs)}
        return measured | ({} if not self._errors else {"bias": sum(self._errors) / len(self._errors)})

    def _optimism(self) -> float:
        """By how much fresh samples are overvalued, in standard deviations within a prompt; 0 if that may be chance.

        The order within prompts cannot tell: a generator that exploits the network moves all of its samples.
        """
        bias, within = stats.mean(self._errors), self._replay.within
        return bias.value / within if within > 0 and bias.t_statistic > _SURE else 0.0

    def _set_pull(self, lesson: int) -> tuple[str, ...]:
        """Set how much of the gradient counts; a warning if that pauses or resumes the reward."""
        before, (self.pull, reason) = self.pull, self._trust()
        if lesson == self.options.warmup:  # before the first update; what was before does not matter
            changed = self.pull == 0
        else:
            changed = lesson > self.options.warmup and (before > 0) != (self.pull > 0)
        return (f"{'pulls again' if self.pull else 'is paused'}: {reason}",) if changed else ()

    def _trust(self) -> tuple[float, str]:
        """How much of the gradient counts, in [0, 1], and why."""
        name, pairs = self.options.of.name, self._pairs
        if len(pairs) < _FEWEST_PAIRS:
            return 0.0, f"{name} has ordered {len(pairs)} pairs of fresh samples of a prompt, not {_FEWEST_PAIRS}"
        tau, low, high = sum(pairs) / len(pairs), self.options.pause_below, self.options.full_above
        optimism = self._optimism()
        pull = min(max((tau - low) / (high - low), 0.0), 1.0) * max(1.0 - optimism, 0.0)
        return pull, (
            f"on fresh samples its rank correlation with {name} is {tau:.2f}, and it overvalues them by {optimism:.2f} "
            "standard deviations within a prompt"
        )

    def training_state(self) -> dict[str, object]:
        """See :meth:`rlhf_t2i.plugins.OnlineReward.training_state`."""
        return {
            "head": self.head.state_dict(), "optimizer": self._optimizer.state_dict(), "replay": self._replay.state(),
            "lessons": self._lessons, "pairs": self._pairs,
            "errors": self._errors, "pull": self.pull, "ready": self.ready,
        }  # fmt: skip

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """See :meth:`rlhf_t2i.plugins.OnlineReward.load_training_state`."""
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._replay.load(state["replay"])
        self._lessons, self._pairs, self._errors = state["lessons"], list(state["pairs"]), list(state["errors"])
        self.pull, self.ready = state["pull"], state["ready"]

    def needs(self, seconds_per_image: float) -> str:
        """See :meth:`rlhf_t2i.plugins.OnlineReward.needs`."""
        schedule = self.schedule(self.options)
        first, each = schedule.warmup * schedule.images, schedule.images
        return (
            f"the scorer values {first} images before the first update ({first * seconds_per_image:.3g} s) and {each} "
            f"per update ({each * seconds_per_image:.3g} s), {schedule.images_per_prompt} of each prompt; evaluations "
            "ask for theirs besides"
        )
