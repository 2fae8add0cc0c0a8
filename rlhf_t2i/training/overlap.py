"""The updates of a cycle, and which calls of them need not wait for each other.

The results are those of the serial order, bit for bit: theta changes only with the generator's update.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_t2i.cluster.base import Cluster
from rlhf_t2i.plugins import traits
from rlhf_t2i.recipe.placement import check_placement
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.assistant import AssistantRole
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.roles.trained import Update

Numbered = tuple[int, Sequence[str]]
"""The number of an update and the prompts of its global batch."""


@dataclass(frozen=True)
class Overlap:
    """What works beside an update of the assistant.

    Attributes:
        samples: The generator draws the samples of the next update.
        learner: The learner draws the first micro-batch of its own, and the rewards score it.
    """

    samples: bool = False
    learner: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> Overlap:
        """What a recipe allows.

        Under ZeRO-3 drawing gathers weights from all ranks, so that they must see the calls of several callers in one
        order: nothing overlaps. A reward that learns has its lesson beside the assistant's updates, and scores after
        it.
        """
        if recipe.placement.mode == "local" or recipe.optimization.zero_stage == 3:
            return cls()
        group = {role: name for role, (name, _) in check_placement(recipe).items()}
        apart = group["learner"] != group["assistant"]
        return cls(group["generator"] != group["assistant"], apart and not traits.resolve(recipe).online)


class Updates:
    """Makes the updates of both networks.

    Args:
        recipe: The recipe.
        cluster: The roles.
    """

    def __init__(self, recipe: Recipe, cluster: Cluster) -> None:
        self._cluster, self._overlap = cluster, Overlap.of(recipe)

    def assistant(self, batches: Mapping[int, Sequence[str]], following: Numbered | None) -> list[Update]:
        """One update of the assistant; returns the report of every rank.

        Args:
            batches: Its prompts by its number, and those of the next one unless the generator is updated before that.
            following: The generator's update that follows; None where another of the assistant's does.
        """
        number = min(batches)
        if self._overlap.samples:
            # Waited for: the learner's own drawing must not come first where it shares a process with the generator.
            self._cluster.call_all("assistant", AssistantRole.request_samples, batches)
        training = self._cluster.submit_all("assistant", AssistantRole.train, number, batches[number])
        if self._overlap.learner and following is not None:
            self._cluster.call_all("learner", LearnerRole.begin, *following)
        return training.result()

    def generator(self, step: int, prompts: Sequence[str]) -> tuple[list[Update], dict[str, float]]:
        """One update of the generator.

        Returns:
            The report of every rank; and the seconds and bytes of sending the weights to a generator in other processes
            (``weights``, ``weight_bytes``), or nothing where it shares them.
        """
        reports = self._cluster.call_all("learner", LearnerRole.step, step, prompts)
        began = time.perf_counter()
        sent = self._cluster.sync_generator()
        return reports, {"weights": time.perf_counter() - began, "weight_bytes": sent} if sent else {}
