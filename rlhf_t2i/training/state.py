"""The state of a training run: which updates are done, and measurements that later metrics need."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from typing import Annotated, ClassVar

from pydantic import ConfigDict, FiniteFloat, NonNegativeInt, TypeAdapter, ValidationError, WrapValidator

TRAINED_ROLES = {"generator": "learner", "assistant": "assistant"}
"""The trained networks, and the roles that train them."""
_LONGEST_WINDOW = 1000
# The gradient norm of a skipped update is infinite, in JSON null.
_Measured = Annotated[FiniteFloat, WrapValidator(lambda value, check: math.inf if value is None else check(value))]


@dataclass
class TrainState:
    """Position of a run; together with the recipe's seed it determines every later random draw.

    Attributes:
        step: Generator updates done.
        round: Assistant updates done in the current cycle (or warm-up).
        rounds: Assistant updates done in total.
        reports: Measurements of the current cycle's rounds, for the next line of metrics.
        bad_steps: Updates of generator or assistant skipped in total because their gradient was not finite.
        bad_in_a_row: Skipped updates of each network since its last good one.
        rewards: The reward term of the last steps, oldest first; checkpoints are compared by its mean.
        lessons: Lessons done in total, of each reward that learns.
        learned: Measurements of the lessons since the last line of metrics.
        lesson_warnings: Warnings of the same lessons.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True)

    step: NonNegativeInt = 0
    round: NonNegativeInt = 0
    rounds: NonNegativeInt = 0
    reports: list[dict[str, _Measured]] = field(default_factory=list)
    bad_steps: NonNegativeInt = 0
    bad_in_a_row: dict[str, NonNegativeInt] = field(default_factory=dict)
    rewards: list[FiniteFloat] = field(default_factory=list)
    lessons: dict[str, NonNegativeInt] = field(default_factory=dict)
    learned: dict[str, FiniteFloat] = field(default_factory=dict)
    lesson_warnings: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, value: object) -> TrainState:
        """The state that :meth:`to_json` wrote.

        Raises:
            ValueError: A field is missing, unknown, of another type, negative or not finite.
        """
        if not isinstance(value, dict) or value.keys() != {f.name for f in fields(cls)}:
            raise ValueError("the fields of the state are not the expected ones")
        try:
            return _ADAPTER.validate_json(json.dumps(value))
        except ValidationError:
            raise ValueError("a field of the state has no valid value") from None

    def to_json(self) -> dict[str, object]:
        """The state as JSON values; a gradient norm that is not finite becomes null."""
        return dict(json.loads(_ADAPTER.dump_json(self)))

    def add_reward(self, reward: float | None, window: int) -> None:
        """Append a step's reward to the window; None and values that are not finite are ignored."""
        if reward is not None and math.isfinite(reward):
            self.rewards = [*self.rewards, reward][-min(window, _LONGEST_WINDOW) :]

    def count_update(self, network: str, applied: bool) -> int:
        """Count an update that was applied or skipped.

        Each network by itself: they take turns, so good updates of one would hide that the other never moves.

        Returns:
            The network's skipped updates in a row; 0 after one that was applied.
        """
        if applied:
            self.bad_in_a_row.pop(network, None)
            return 0
        self.bad_steps += 1
        self.bad_in_a_row[network] = self.bad_in_a_row.get(network, 0) + 1
        return self.bad_in_a_row[network]

    def mean_reward(self) -> float | None:
        """The mean over the window; None before the first reward."""
        return math.fsum(self.rewards) / len(self.rewards) if self.rewards else None


_ADAPTER = TypeAdapter(TrainState)
