"""The state of a training run: which updates are done, and measurements that later metrics need."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

TRAINED_ROLES = {"generator": "learner", "assistant": "assistant"}
"""The trained networks, and the roles that train them."""
_LONGEST_WINDOW = 1000


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
    """

    step: int = 0
    round: int = 0
    rounds: int = 0
    reports: list[dict[str, float]] = field(default_factory=list)
    bad_steps: int = 0
    bad_in_a_row: dict[str, int] = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)

    @classmethod
    def from_json(cls, value: object) -> TrainState:
        """The state that :meth:`to_json` wrote.

        Raises:
            ValueError: A field is missing, unknown, of another type, negative or not finite.
        """
        if not isinstance(value, dict) or value.keys() != {f.name for f in fields(cls)}:
            raise ValueError("the fields of the state are not the expected ones")
        state = cls(**value)
        counts = [state.step, state.round, state.rounds, state.bad_steps]
        if not (
            isinstance(state.reports, list)
            and isinstance(state.bad_in_a_row, dict)
            and isinstance(state.rewards, list)
            and all(isinstance(report, dict) for report in state.reports)
            and all(map(_is_count, [*counts, *state.bad_in_a_row.values()]))
            and all(map(_is_number, state.rewards))
            # The gradient norm of a skipped update is null in JSON.
            and all(v is None or _is_number(v) for report in state.reports for v in report.values())
        ):
            raise ValueError("a field of the state has no valid value")
        state.reports = [{k: math.inf if v is None else v for k, v in report.items()} for report in state.reports]
        return state

    def to_json(self) -> dict[str, Any]:
        """The state as JSON values; a gradient norm that is not finite becomes null."""
        value = asdict(self)
        value["reports"] = [{k: v if math.isfinite(v) else None for k, v in report.items()} for report in self.reports]
        return value

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


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
