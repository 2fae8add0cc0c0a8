"""One declaration per method: how batches are split and joined, and which local calls overlap with remote ones."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_t2i.algorithm import rng
from rlhf_t2i.recipe.schema import ROLES, Recipe
from rlhf_t2i.roles import dispatch
from rlhf_t2i.roles.denoiser import DenoiserServer
from rlhf_t2i.roles.generator import GeneratorRole
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.roles.local_calls import Background, LocalClient, gather
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.roles.stopwatch import WAIT, stopwatch
from rlhf_t2i.roles.worker import Worker, WorkerSpec
from tests.limits import HANG_S

PROMPTS = [f"prompt {i}" for i in range(5)]
BATCHED = [
    DenoiserServer.forward, DenoiserServer.vjp, GeneratorRole.sample, RewardRole.value_and_grad, RewardRole.score,
    RewardRole.decode,
]  # fmt: skip


@pytest.mark.parametrize("method", BATCHED)
def test_declared_names_are_parameters(method: Any) -> None:
    assert set(dispatch.Batched.of(method).names) <= inspect.signature(method).parameters.keys()


def test_a_method_without_a_declaration_cannot_be_split() -> None:
    with pytest.raises(TypeError, match=r"LearnerRole.step is not declared with @batched"):
        dispatch.split(LearnerRole.step, 2, 0, PROMPTS)


def test_shares_are_contiguous_and_as_equal_as_possible() -> None:
    latents = torch.arange(5.0)
    parts, batch = dispatch.split(RewardRole.score, 3, latents, prompts=PROMPTS)
    assert batch == 5
    assert [part[0].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert [part[1] for part in parts] == [PROMPTS[:2], PROMPTS[2:4], PROMPTS[4:]]
    assert [part[2:] for part in parts] == [(None,)] * 3  # defaults are part of the call


def test_with_fewer_samples_than_servers_a_collective_call_still_reaches_all() -> None:
    x_t = torch.arange(2.0)
    request = ("id", x_t, x_t, PROMPTS[:2], "guided", True)
    parts, batch = dispatch.split(DenoiserServer.forward, 4, *request)
    assert [part[1].tolist() for part in parts] == [[0], [1], [1], [1]]
    assert dispatch.join([part[1] for part in parts], batch).tolist() == [0, 1]
    parts, _ = dispatch.split(RewardRole.score, 4, x_t, PROMPTS[:2])
    assert len(parts) == 2  # a reward is no collective: nothing is computed twice


def test_answers_of_any_shape_are_joined_along_the_batch() -> None:
    answers = [{"a": (torch.full((2,), i), torch.full((2, 3), i))} for i in (0.0, 1.0)]
    values, gradients = dispatch.join(answers, 3)["a"]
    assert values.tolist() == [0, 0, 1]
    assert gradients.shape == (3, 3)


class Elsewhere:
    """A client of a role in another process: works from the moment a call is submitted."""

    def __init__(self, role: Any) -> None:
        self.role, self.pool = role, ThreadPoolExecutor(1)
        self.place = self

    def submit(self, method: Callable[..., Any], *args: Any) -> Any:
        return self.pool.submit(getattr(self.role, method.__name__), *args)


class Meets:
    """A role whose call ends once another one has begun, too."""

    def __init__(self, both: threading.Barrier) -> None:
        self.both = both

    @dispatch.batched("x")
    def denoiser(self, x: Tensor) -> Tensor:
        self.both.wait(HANG_S)
        return x + 1


def test_local_calls_run_while_remote_ones_are_in_flight() -> None:
    """In whatever order they were submitted."""
    role = Meets(threading.Barrier(2))
    remote, local = Elsewhere(role), LocalClient("reference", role)
    for clients in ((remote, local), (local, remote)):
        both = gather([client.submit(Meets.denoiser, torch.zeros(1)) for client in clients])
        assert [float(part) for part in both] == [1, 1]


class Timed:
    """A role whose calls take 0.3 s by a clock of the test; the one in the background ends while it is waited for."""

    def __init__(self) -> None:
        self.now, self.threads, self.inside = 0.0, list[str](), 0
        self._main = threading.get_ident()

    @dispatch.batched("x", concurrent=True)
    def reward(self, x: Tensor) -> Tensor:
        self.inside += 1
        while threading.get_ident() != self._main and stopwatch._open.get(self._main, [])[-1:] != [WAIT]:
            time.sleep(0.001)
        assert self.inside == 1, "two calls at once"
        self.threads.append(threading.current_thread().name)
        self.now += 0.3
        self.inside -= 1
        return x + 1

    @dispatch.batched("x")
    def denoiser(self, x: Tensor) -> Tensor:
        return self.reward(x)


def test_only_calls_declared_concurrent_leave_the_main_thread_and_never_two_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    role = Timed()
    monkeypatch.setattr("rlhf_t2i.roles.stopwatch.time", SimpleNamespace(perf_counter=lambda: role.now))
    client = LocalClient("reward", role, Background())
    stopwatch.read()
    gather([client.submit(method, torch.zeros(1)) for method in (Timed.reward, Timed.denoiser)])
    assert role.threads == ["background_0", threading.current_thread().name]
    seconds, _ = stopwatch.read()
    assert seconds["reward"] == pytest.approx(0.6)  # the sum over both threads
    assert seconds[WAIT] == pytest.approx(0.3)


def test_an_error_in_the_background_reaches_the_caller() -> None:
    class Bad:
        @dispatch.batched("x", concurrent=True)
        def score(self, x: Tensor) -> Tensor:
            raise ValueError("a bad reward")

    future = LocalClient("reward", Bad(), Background()).submit(Bad.score, torch.zeros(1))
    with pytest.raises(ValueError, match="a bad reward"):
        future.result()


def test_rewards_of_the_learners_process_overlap_remote_denoisers(make_recipe: Callable[..., Recipe]) -> None:
    """Neither ends before the other has begun, and not a bit changes."""
    worker = Worker(WorkerSpec(make_recipe(), "all", ROLES))
    keys = [(3, "probe", i) for i in range(4)]
    x0 = rng.normal((4, 8, 8), keys)
    learner: LearnerRole = worker.roles["learner"]

    def gradient() -> Tensor:
        return learner.gradient_at_x0("probe", x0, PROMPTS[:4], keys, {})

    worker.connect({})
    serial = gradient()
    servers = {role: worker.roles.pop(role) for role in ("assistant", "reference")}
    worker.connect({role: [Elsewhere(server)] for role, server in servers.items()})
    begun = {"reward": threading.Event(), "denoiser": threading.Event()}

    def hold(role: Any, method: str, own: str, other: str) -> None:
        call = getattr(role, method)

        def held(*args: Any) -> Any:
            begun[own].set()
            assert begun[other].wait(HANG_S), f"{method} ran alone"
            return call(*args)

        setattr(role, method, held)

    hold(worker.roles["reward"], "value_and_grad", "reward", "denoiser")
    for server in servers.values():
        hold(server, "forward", "denoiser", "reward")
    assert torch.equal(gradient(), serial)


def test_a_server_keeps_one_graph_per_caller(make_recipe: Callable[..., Recipe]) -> None:
    """Eight ranks of the learner on one reference: eight forwards for eight requests, none is computed again."""
    groups = "{learn: {devices: 8, roles: [learner, generator, assistant, reward]}, look: {roles: [reference]}}"
    recipe = make_recipe(placement="{mode: ray, groups: " + groups + "}", optimization__batch_size=8)
    server = Worker(WorkerSpec(recipe, "look", ("reference",))).roles["reference"]
    forwards: list[int] = []
    predict = server._predict
    server._predict = lambda *args: forwards.append(1) or predict(*args)
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    requests: Sequence[Any] = [(str(caller), x_t, t, ["a cat"], "guided") for caller in range(8)]
    answers = [server.forward(*request, True) for request in requests]
    for request, answer in zip(requests, answers, strict=True):
        server.vjp(*request, answer)
    assert len(forwards) == 8
    assert not server._graphs
