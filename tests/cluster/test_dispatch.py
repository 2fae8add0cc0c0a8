"""One declaration per method: how batches are split and joined, and which local calls overlap with remote ones."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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


class Slow:
    """A role that takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.threads = seconds, set[str]()

    @dispatch.batched("x", concurrent=True)
    def reward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        self.threads.add(threading.current_thread().name)
        return x + 1

    @dispatch.batched("x")
    def denoiser(self, x: Tensor) -> Tensor:
        return self.reward(x)


class Elsewhere:
    """A client of a role in another process: works from the moment a call is submitted."""

    def __init__(self, role: Any, delay: float = 0.0) -> None:
        self.role, self.delay, self.pool = role, delay, ThreadPoolExecutor(1)

    def submit(self, method: Callable[..., Any], *args: Any) -> Any:
        def call() -> Any:
            time.sleep(self.delay)
            return getattr(self.role, method.__name__)(*args)

        return self.pool.submit(call)


def elapsed(call: Callable[[], Any]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def test_local_calls_run_while_remote_ones_are_in_flight() -> None:
    """In whatever order they were submitted, with or without a background thread."""
    x = torch.zeros(1)
    remote, local = Elsewhere(Slow(0.5)), LocalClient("reference", Slow(0.5))
    both: list[Any] = []
    seconds = elapsed(lambda: both.extend(gather([c.submit(Slow.denoiser, x) for c in (remote, local)])))
    assert 0.5 <= seconds < 0.9
    assert [float(part) for part in both] == [1, 1]


def test_only_calls_declared_concurrent_leave_the_main_thread_and_never_two_at_once() -> None:
    role = Slow(0.3)
    client = LocalClient("reward", role, Background())
    stopwatch.read()

    def both() -> None:
        futures = [client.submit(Slow.reward, torch.zeros(1)), client.submit(Slow.denoiser, torch.zeros(1))]
        gather(futures)

    assert elapsed(both) >= 0.6
    assert len(role.threads) == 2
    assert threading.current_thread().name in role.threads
    seconds, _ = stopwatch.read()
    assert seconds["reward"] == pytest.approx(0.6, abs=0.2)  # the sum over both threads
    assert seconds[WAIT] == pytest.approx(0.3, abs=0.2)


def test_an_error_in_the_background_reaches_the_caller() -> None:
    class Bad:
        @dispatch.batched("x", concurrent=True)
        def score(self, x: Tensor) -> Tensor:
            raise ValueError("a bad reward")

    future = LocalClient("reward", Bad(), Background()).submit(Bad.score, torch.zeros(1))
    with pytest.raises(ValueError, match="a bad reward"):
        future.result()


SLOW_REWARD = """
import time
import torch
from rlhf_t2i.plugins import Reward

class SlowReward(Reward):
    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        time.sleep(1.0)
        return (images ** 2).mean((1, 2, 3))
"""


def test_rewards_of_the_learners_process_overlap_remote_denoisers(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """1.0 s of reward beside 0.8 s of denoisers (0.4 s forward, 0.4 s product), and not a bit changes."""
    (tmp_path / "slow.py").write_text(SLOW_REWARD, "utf-8")
    recipe = make_recipe(algorithm__rewards=f"[{{name: '{tmp_path}/slow.py:SlowReward', label: slow}}]")
    worker = Worker(WorkerSpec(recipe, "all", ROLES))
    keys = [(3, "probe", i) for i in range(4)]
    x0 = rng.normal((4, 8, 8), keys)
    learner: LearnerRole = worker.roles["learner"]

    def gradient() -> Tensor:
        return learner.gradient_at_x0("probe", x0, PROMPTS[:4], keys, {})

    worker.connect({})
    serial = gradient()
    servers = {role: worker.roles.pop(role) for role in ("assistant", "reference")}
    worker.connect({role: [Elsewhere(server, delay=0.4)] for role, server in servers.items()})
    gradient()  # what torch prepares once
    overlapping: list[Tensor] = []
    seconds = elapsed(lambda: overlapping.append(gradient()))
    assert torch.equal(overlapping[0], serial)
    assert 1.0 <= seconds < 1.5  # one after another: 1.9 s


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
