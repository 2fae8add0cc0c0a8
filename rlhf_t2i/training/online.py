"""Lessons of rewards that learn: fresh samples of the generator, before each of its updates.

The samples are drawn for this purpose, as the assistant's are: how many the scorer sees is the reward's own setting,
and not the batch size. A lesson starts before the assistant's updates and is waited for after them, so that it overlaps
with them where the reward has a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from rlhf_t2i.algorithm import rng
from rlhf_t2i.algorithm.prompts import PromptStream
from rlhf_t2i.cluster.base import Cluster
from rlhf_t2i.errors import UsageError, option
from rlhf_t2i.plugins import traits
from rlhf_t2i.plugins.online import Lesson
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.dispatch import Future
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.training.state import TrainState

_FOLDER = "reward"


@dataclass
class OnlineRewards:
    """The rewards of a run that learn.

    Attributes:
        recipe: The recipe.
        cluster: The roles.
        train: The training prompts.
        state: Of the run; its lessons are counted here.
        phase: Receives what may take long.
    """

    recipe: Recipe
    cluster: Cluster
    train: Sequence[str]
    state: TrainState
    phase: Callable[[str], None]
    _running: dict[str, Future[Lesson]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seed = self.recipe.seed
        self._schedules = traits.resolve(self.recipe).online
        self._streams = {label: PromptStream(self.train, seed, f"reward {label}") for label in self._schedules}

    def start(self, between: Callable[[], None]) -> None:
        """Give the lessons that are due before the next generator update; the last one of each reward only starts.

        Args:
            between: Called after every lesson of a warm-up; may raise.
        """
        for label, schedule in self._schedules.items():
            due = schedule.lessons(self.state.step)
            while (done := self.state.lessons.get(label, 0)) < due:
                self._begin(label)
                if done + 1 == due:
                    break
                self.phase(f"warm-up of reward {label}, lesson {done + 1} of {due}")
                self.finish()
                between()

    def _begin(self, label: str) -> None:
        schedule, seed = self._schedules[label], self.recipe.seed
        lesson = self.state.lessons.get(label, 0)
        distinct = self._streams[label].batch(lesson * schedule.prompts, schedule.prompts)
        prompts = [prompt for prompt in distinct for _ in range(schedule.images_per_prompt)]
        keys: list[rng.Key] = [(seed, "reward", label, lesson, index) for index in range(len(prompts))]
        latents = self.cluster.sample(prompts, keys, "raw")
        draws = rng.seed_of(seed, "lesson", label, lesson)
        self._running[label] = self.cluster.submit_to_reward(
            label, RewardRole.learn, label, lesson, latents, prompts, draws
        )

    def finish(self) -> None:
        """Wait for the lessons that run, and count them."""
        while self._running:
            label = next(iter(self._running))
            report = self._running.pop(label).result()
            self.state.lessons[label] = self.state.lessons.get(label, 0) + 1
            measured = {"true": report.true, **report.metrics}
            self.state.learned |= {f"online/{label}/{name}": value for name, value in measured.items()}
            self.state.lesson_warnings += [f"reward {label!r}: {text}" for text in report.warnings]

    def save(self, folder: Path) -> None:
        """Write what they have learned into a checkpoint."""
        if self._schedules:
            (folder / _FOLDER).mkdir()
        for label in self._schedules:
            self.cluster.submit_to_reward(label, RewardRole.save, label, str(_file(folder, label))).result()


def restore(recipe: Recipe, cluster: Cluster, folder: Path) -> None:
    """Load from a checkpoint what the rewards of a run have learned.

    Raises:
        UsageError: The checkpoint was written without one of them.
    """
    for label in traits.resolve(recipe).online:
        if not _file(folder, label).is_file():
            raise UsageError(f"{option('resume')}: checkpoint {folder.name} holds no state of the reward {label!r}")
        cluster.submit_to_reward(label, RewardRole.load, label, str(_file(folder, label))).result()


def _file(folder: Path, label: str) -> Path:
    return folder / _FOLDER / f"{quote(label, safe='')}.pt"
