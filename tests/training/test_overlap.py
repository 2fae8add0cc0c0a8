"""Calls that need not wait for each other do not, and not a bit of the results changes.

Nothing is timed: a stub of another process holds an answer back until the call that should overlap has begun. Without
the overlap it never does, and the test fails.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from rlhf_t2i.recipe.schema import ROLES, Recipe
from rlhf_t2i.roles.assistant import AssistantRole
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.roles.worker import Worker, WorkerSpec
from rlhf_t2i.training.overlap import Overlap, Updates
from tests.limits import HANG_S

MakeRecipe = Callable[..., Recipe]
PROMPTS = [f"prompt {i}" for i in range(4)]
APART = (
    "placement={mode: ray, groups: {learn: {roles: [learner, generator]}, "
    "serve: {roles: [assistant, reference, reward]}}}"
)


class Log:
    """The starts and ends of calls, in order."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self._changed = threading.Condition()

    def add(self, entry: str) -> None:
        with self._changed:
            self.entries.append(entry)
            self._changed.notify_all()

    def wait_for(self, entry: str) -> None:
        """Wait until it is there.

        Raises:
            TimeoutError: Nothing like it comes.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: entry in self.entries, HANG_S):
                raise TimeoutError(f"{entry!r} never came; {self.entries}")

    def before(self, first: str, then: str) -> bool:
        return self.entries.index(first) < self.entries.index(then)


class Elsewhere:
    """A client of a role in another process.

    Args:
        role: The role.
        log: Gets ``METHOD start NUMBER`` and ``METHOD end NUMBER``.
        held: By ``METHOD NUMBER``, what a call waits for before it ends.
        place: Equal for roles of one process; a process of its own when None.
    """

    def __init__(self, role: Any, log: Log, held: dict[str, str] | None = None, place: str | None = None) -> None:
        self.role, self.log, self.held, self.pool = role, log, held or {}, ThreadPoolExecutor(1)
        self.place = place or self
        self.numbers: dict[str, int] = {}

    def submit(self, method: Callable[..., Any], *args: Any) -> Any:
        name = method.__name__
        number = self.numbers[name] = self.numbers.get(name, -1) + 1
        self.log.add(f"{name} submit {number}")

        def call() -> Any:
            result = getattr(self.role, name)(*args)
            if f"{name} {number}" in self.held:
                self.log.wait_for(self.held[f"{name} {number}"])
            self.log.add(f"{name} end {number}")
            return result

        return self.pool.submit(call)


@pytest.fixture
def workers(make_recipe: MakeRecipe) -> Callable[..., Worker]:
    """Two workers of the same recipe: one for the serial order, one whose roles are called elsewhere."""

    def build(**changes: Any) -> Worker:
        return Worker(WorkerSpec(make_recipe(optimization__micro_batch=2, **changes), "all", ROLES))

    return build


def theta(worker: Worker) -> torch.Tensor:
    return torch.cat([value.flatten() for value in worker.roles["learner"].weights("raw").values()])


def test_the_next_micro_batch_starts_while_the_products_of_the_last_come_back(workers: Callable[..., Worker]) -> None:
    serial, apart, log = workers(), workers(), Log()
    serial.connect({})
    expected = serial.roles["learner"].step(0, PROMPTS)
    held = {"vjp 0": "forward submit 1"}
    servers = {
        "assistant": Elsewhere(apart.roles["assistant"], log, held),
        "reference": Elsewhere(apart.roles["reference"], Log()),
        "reward": Elsewhere(apart.roles["reward"], log, {"value_and_grad 0": "value_and_grad submit 1"}),
    }
    for role in servers:
        del apart.roles[role]
    apart.connect({role: [client] for role, client in servers.items()})
    found = apart.roles["learner"].step(0, PROMPTS)
    assert log.before("vjp submit 0", "forward submit 1")
    assert log.before("forward submit 1", "vjp end 0")
    assert log.before("value_and_grad submit 1", "value_and_grad end 0")
    assert found == expected
    assert torch.equal(theta(apart), theta(serial))
    assert not servers["assistant"].role._graphs


def test_without_another_process_one_micro_batch_follows_the_other(workers: Callable[..., Worker]) -> None:
    """No graph of the learner is kept longer than it must be."""
    worker, order = workers(), []
    worker.connect({})
    learner = worker.roles["learner"]
    draw, backward = learner._draw, learner.engine.backward
    learner._draw = lambda *args: (order.append("draw"), draw(*args))[1]
    learner.engine.backward = lambda *args: (order.append("backward"), backward(*args))[1]
    learner.step(0, PROMPTS)
    assert order == ["draw", "backward", "draw", "backward"]


def test_samples_of_the_next_update_are_drawn_while_the_assistant_trains(workers: Callable[..., Worker]) -> None:
    serial, apart, log = workers(), workers(), Log()
    serial.connect({})
    assistant: AssistantRole = apart.roles["assistant"]
    expected = [serial.roles["assistant"].train(number, PROMPTS) for number in (0, 1)]
    # The generator's third and fourth call are of the next update: this one ends after both.
    generator = Elsewhere(apart.roles.pop("generator"), log)
    apart.connect({"generator": [generator]})
    backward = assistant.engine.backward
    assistant.engine.backward = lambda loss: (log.wait_for("sample end 3"), log.add("backward"), backward(loss))[2]
    assistant.request_samples({0: PROMPTS, 1: PROMPTS})
    found = [assistant.train(number, PROMPTS) for number in (0, 1)]
    assert log.before("sample end 3", "backward")
    assert found == expected
    assert generator.numbers == {"sample": 3}  # no sample is drawn twice


def test_the_learner_draws_and_is_rewarded_before_the_assistant_is_asked(workers: Callable[..., Worker]) -> None:
    serial, apart, log = workers(), workers(), Log()
    serial.connect({})
    expected = serial.roles["learner"].step(0, PROMPTS)
    servers = {role: Elsewhere(apart.roles.pop(role), log) for role in ("assistant", "reference", "reward")}
    apart.connect({role: [client] for role, client in servers.items()})
    learner: LearnerRole = apart.roles["learner"]
    learner.begin(0, PROMPTS)
    log.wait_for("value_and_grad end 0")
    assert log.entries == ["value_and_grad submit 0", "value_and_grad end 0"]
    assert learner.step(0, PROMPTS) == expected
    assert servers["reward"].numbers == {"value_and_grad": 1}  # two micro-batches, neither is scored twice
    assert torch.equal(theta(apart), theta(serial))


@pytest.mark.parametrize(
    ("places", "begun", "asked"),
    [
        ({"reward": "serve", "assistant": "serve"}, False, ["forward", "value_and_grad"]),
        ({"reward": "serve", "reference": "serve"}, False, ["forward", "value_and_grad"]),
        ({"reward": "serve", "reference": "serve"}, True, ["value_and_grad", "forward"]),
        ({"reward": "serve", "assistant": "serve"}, True, ["forward", "value_and_grad"]),
        ({"reward": "serve", "assistant": "serve", "reference": "serve"}, False, ["value_and_grad", "forward"]),
    ],
    ids=["assistant", "reference", "reference while the assistant trains", "not while it trains", "both"],
)
def test_a_reward_beside_one_denoiser_is_asked_after_its_prediction(
    workers: Callable[..., Worker], places: dict[str, str], begun: bool, asked: list[str]
) -> None:
    """The other denoiser's product would wait for it."""
    serial, apart, log = workers(), workers(), Log()
    serial.connect({})
    expected = serial.roles["learner"].step(0, PROMPTS)
    roles = ("assistant", "reference", "reward")
    servers = {
        role: Elsewhere(apart.roles.pop(role), log if role in places else Log(), place=places.get(role))
        for role in roles
    }
    apart.connect({role: [client] for role, client in servers.items()})
    if begun:
        apart.roles["learner"].begin(0, PROMPTS)
    assert apart.roles["learner"].step(0, PROMPTS) == expected
    submitted = [entry.split()[0] for entry in log.entries if entry.endswith("submit 0")]
    assert list(dict.fromkeys(submitted))[:2] == asked
    assert servers["reward"].numbers == {"value_and_grad": 1}
    assert torch.equal(theta(apart), theta(serial))


def test_the_assistant_encodes_its_prompts_while_the_samples_are_drawn(workers: Callable[..., Worker]) -> None:
    worker, log = workers(), Log()
    held = {"sample 0": "encode", "sample 1": "encode"}
    worker.connect({"generator": [Elsewhere(worker.roles.pop("generator"), log, held)]})
    assistant: AssistantRole = worker.roles["assistant"]
    encode = assistant._store.conditioner.encode
    assistant._store.conditioner.encode = lambda prompts: (
        threading.current_thread() is threading.main_thread() and log.add("encode"),
        encode(prompts),
    )[1]
    assistant.train(0, PROMPTS)
    assert log.before("encode", "sample end 0")


class Calls:
    """A cluster that notes what is called, and when answers are waited for."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def submit_all(self, role: str, method: Callable[..., Any], *args: Any) -> Any:
        self.order.append(method.__name__)
        return self

    def result(self) -> list[Any]:
        self.order.append("waited")
        return []

    def call_all(self, role: str, method: Callable[..., Any], *args: Any) -> list[Any]:
        return self.submit_all(role, method, *args).result()


@pytest.mark.parametrize(
    ("changes", "overlap"),
    [
        ("placement=local", Overlap()),
        (APART, Overlap(samples=True, learner=True)),
        ("placement={mode: ray, groups: {all: {roles: [learner, assistant, reference, reward]}}}", Overlap()),
        ("placement={mode: ray, groups: {learn: {roles: [learner, reward]}, "
         "serve: {roles: [generator, assistant, reference]}}}", Overlap(learner=True)),
    ],
    ids=["local", "apart", "together", "generator with the assistant"],
)  # fmt: skip
def test_what_overlaps_follows_from_the_placement(make_recipe: MakeRecipe, changes: str, overlap: Overlap) -> None:
    key, _, value = changes.partition("=")
    recipe = make_recipe(**{key: value})
    assert Overlap.of(recipe) == overlap
    if recipe.placement.mode == "ray":
        assert Overlap.of(make_recipe(**{key: value}, optimization__zero_stage=3)) == Overlap()


def test_the_learner_begins_after_the_samples_were_asked_for_and_while_the_assistant_trains(
    make_recipe: MakeRecipe,
) -> None:
    cluster = Calls()
    updates = Updates(make_recipe(placement=APART.partition("=")[2]), cluster)  # type: ignore[arg-type]
    updates.assistant({3: PROMPTS, 4: PROMPTS}, None)
    assert cluster.order == ["request_samples", "waited", "train", "waited"]
    cluster.order.clear()
    updates.assistant({4: PROMPTS}, (2, PROMPTS))
    assert cluster.order == ["request_samples", "waited", "train", "begin", "waited", "waited"]
