"""``placement: local``: every role in this process, without Ray; the debugger's mode and the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf_t2i.cluster.base import STEP_TIMEOUT_KEY, Cluster, Weights
from rlhf_t2i.plugins.time_limit import limited
from rlhf_t2i.recipe.schema import ROLES, Recipe
from rlhf_t2i.roles.dispatch import Client, Future, Method, P, T
from rlhf_t2i.roles.generator import GeneratorRole
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.roles.local_calls import Deferred
from rlhf_t2i.roles.trained import TrainedRole
from rlhf_t2i.roles.worker import Reading, Worker, WorkerSpec


@dataclass
class _WorkerClient:
    """The controller's client: answers come back on the CPU, as over Ray."""

    cluster: LocalCluster
    role: str

    @property
    def place(self) -> object:
        """See :class:`rlhf_t2i.roles.dispatch.Client`."""
        return "local"

    def submit(self, method: Method[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See :class:`rlhf_t2i.roles.dispatch.Client`."""
        return Deferred(partial(self.cluster.call, self.role, method, *args, **kwargs))


class LocalCluster(Cluster):
    """One worker that holds all roles."""

    def __init__(self, recipe: Recipe, failures: Path | None = None) -> None:
        self._timeout_s = recipe.placement.step_timeout_s
        self._timeouts = {reward.key: reward.timeout_s for reward in recipe.algorithm.rewards}
        self._worker = Worker(WorkerSpec(recipe, "local", ROLES, failures=failures))
        self._worker.connect({})

    def clients(self, role: str) -> Sequence[Client]:
        """The worker."""
        return [_WorkerClient(self, role)]

    def submit_all(self, role: str, method: Method[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[list[T]]:
        """See :meth:`Cluster.submit_all`; a role has one rank here."""
        return Deferred(lambda: [self.call(role, method, *args, **kwargs)])

    def call(self, role: str, method: Method[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method of a role, for at most ``placement.step_timeout_s``."""
        with limited(f"{role}.{method.__name__}", self._timeout_s, STEP_TIMEOUT_KEY):
            return self._worker.call(role, method, *args, **kwargs)

    def submit_to_reward(self, label: str, method: Method[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Called when its result is asked for: this process has one device. Its limit is the reward's, as over Ray."""

        def call() -> T:
            with limited(f"reward {label!r}", self._timeouts[label], f"timeout_s of {label}"):
                return self.call("reward", method, *args, **kwargs)

        return Deferred(call)

    def sync_generator(self, weights: Weights = "raw") -> int:
        """See :meth:`Cluster.sync_generator`: the generator is the learner's own network."""
        if weights == "raw":
            return 0
        size, packed = self.call("learner", LearnerRole.pack, weights, 0, 1)
        self.call("generator", GeneratorRole.load, weights, packed)
        return size

    def finish_saving(self, role: str) -> None:
        """See :meth:`Cluster.finish_saving`."""
        trained = self._worker.roles[role]
        assert isinstance(trained, TrainedRole)
        trained.finish_saving()

    def readings(self) -> dict[str, Reading]:
        """See :meth:`Cluster.readings`."""
        return {"local/0": self._worker.reading()}

    def close(self) -> None:
        """Nothing to stop."""
