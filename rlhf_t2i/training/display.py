"""Who is told how a run goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rlhf_t2i.training.checkpoints import TrainState


class Display(Protocol):
    """Who is told how the run goes (the CLI's progress bar, or nobody)."""

    def phase(self, text: str) -> None:
        """Something long begins."""

    def step(self, progress: TrainState, metrics: dict[str, Any]) -> None:
        """A generator step is done."""

    def note(self, text: str) -> None:
        """A sentence for the user."""


class Silent:
    """Tells nobody."""

    def phase(self, text: str) -> None:
        """Nothing."""

    def step(self, progress: TrainState, metrics: dict[str, Any]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""
