"""Labels of rewards: distinct, and none that a run gives to a measure of its own."""

from __future__ import annotations

from collections.abc import Sequence

RUN_MEASURES = ("reward", "diversity", "latent_distance")
"""Keys in a run's metrics, table and watch that are no reward's."""
SCORER = "true "
"""Before the label of a reward that learns: what its scorer says."""


def check(labels: Sequence[str]) -> None:
    """Refuse labels under which one measure would replace another.

    Raises:
        ValueError: Names the label.
    """
    twice = next((label for place, label in enumerate(labels) if label in labels[:place]), None)
    if twice is not None:
        raise ValueError(f"two rewards are called {twice!r}: give one a label of its own")
    taken = next((label for label in labels if label in RUN_MEASURES or label.startswith(SCORER)), None)
    if taken is not None:
        raise ValueError(f"no reward can be called {taken!r}, which is a measure of the run: give it another label")
