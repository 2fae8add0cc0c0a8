"""Rewards that learn while the generator trains: what a plugin must define, and what it reports.

Their state belongs to the run: it is saved in every checkpoint and restored with it, and a process that loses it
counts as a process that trains (docs/faults.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rlhf_t2i.plugins.base import Options, Reward


@dataclass(frozen=True)
class Schedule:
    """How many of the generator's samples an online reward learns from.

    Attributes:
        prompts: Prompts per lesson.
        images_per_prompt: Images of each prompt: their order is what the gradient needs, see docs/rewards.md.
        warmup: Lessons before the first generator update; one more precedes every update.
    """

    prompts: int
    images_per_prompt: int
    warmup: int

    @property
    def images(self) -> int:
        """Images per lesson."""
        return self.prompts * self.images_per_prompt

    def lessons(self, step: int) -> int:
        """Lessons that precede the generator update number ``step`` (from 0)."""
        return self.warmup + step + 1


@dataclass(frozen=True)
class Lesson:
    """Report of one lesson.

    Attributes:
        true: The mean of the scorer's values over the lesson's fresh samples; checkpoints are compared by it.
        metrics: Finite numbers by name, logged as ``online/LABEL/NAME``.
        warnings: Sentences for the user.
    """

    true: float
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class OnlineReward(Reward):
    """Base class of rewards that learn from the generator's samples and a scorer without a gradient.

    ``score`` is the differentiable prediction that trains the generator; :meth:`true_score` is what it predicts, and
    what every evaluation reports. One process holds the reward. Nothing may be drawn from a global random state.
    """

    ready: bool = False
    """Whether it has learned enough to predict; set by the first :meth:`learn` or :meth:`load_training_state`."""

    @classmethod
    def schedule(cls, options: Options) -> Schedule:
        """How many samples it learns from."""
        raise NotImplementedError(f"{cls.__name__} must define schedule(options)")

    def true_score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scorer's values [B] of images [B, 3, H, W] in [0, 1], without gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define true_score(images, prompts)")

    def learn(self, lesson: int, images: Tensor, prompts: Sequence[str], seed: int) -> Lesson:
        """Learn from fresh samples of the generator. Called once per lesson, in order.

        Args:
            lesson: Counts from 0.
            images: Float [B, 3, H, W] in [0, 1], with 8 bits; those of a prompt are adjacent.
            prompts: B strings.
            seed: Of this lesson's draws.
        """
        raise NotImplementedError(f"{type(self).__name__} must define learn(lesson, images, prompts, seed)")

    def training_state(self) -> dict[str, object]:
        """Everything that later lessons and scores depend on: tensors, numbers, texts, and lists and dicts of them."""
        raise NotImplementedError(f"{type(self).__name__} must define training_state()")

    def load_training_state(self, state: Mapping[str, object]) -> None:
        """Continue from :meth:`training_state`, bit for bit."""
        raise NotImplementedError(f"{type(self).__name__} must define load_training_state(state)")

    def needs(self, seconds_per_image: float) -> str:
        """What training with it will cost, for ``rlhf-t2i rewards check``: one line.

        Args:
            seconds_per_image: Of :meth:`true_score`, measured.
        """
        raise NotImplementedError(f"{type(self).__name__} must define needs(seconds_per_image)")


def predicted(label: str) -> str:
    """The name of an online reward's prediction beside its true score."""
    return f"{label} (predicted)"
