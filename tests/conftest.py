"""Shared fixtures. The environment is set before torch, ray or a hub client is imported."""

from __future__ import annotations

import ast
import os
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    # Ray's own is 15: its processes would wait for the tests of the other workers.
    RAY_worker_niceness="0",
    RLHF_T2I_TESTS_SESSION=os.environ.get("RLHF_T2I_TESTS_SESSION", str(os.getpid())),
    GLOO_SOCKET_IFNAME="lo",
    # One thread per process, and none that spins while it waits: the workers and their processes share the cores.
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",
    # Ray's workers do not import from the working folder: actors of tests are found here.
    PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
)

if os.environ.get("RLHF_T2I_TESTS_FORK") == "1":
    # Ray's Python processes are forks of one that has imported everything (tests/forks.py).
    os.environ["RAY_RUNTIME_ENV_HOOK"] = "tests.forks.hook"

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Recipe
from tests import tiers, tiny
from tests.limits import HANG_S

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under ``-n``: the tests of a file stay on one worker, and those that start Ray run in two streams.

    Most of the time of a test over Ray is spent waiting; more than two clusters at once starve two cores. The streams
    are the longest work by far, so they start first: pytest-xdist itself begins with the files of most tests.
    Not ``--dist loadgroup``: with pytest 9.2 pytest-xdist 3.8 loses the names of its groups.
    """
    from xdist.scheduler import LoadScopeScheduling

    streams = ("ray 0", "ray 1")

    class TwoRays(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            if not _starts_ray(config.rootpath / file, test.partition("[")[0]):
                return file
            return streams[file.removeprefix("tests/") in tiers.SECOND_RAY_STREAM]

        def _assign_work_unit(self, node: Any) -> None:
            waiting = [stream for stream in streams if stream in self.workqueue]
            if waiting:
                self.workqueue.move_to_end(waiting[0], last=False)
            super()._assign_work_unit(node)

    return TwoRays(config, log)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark every test with its tier, so that ``-m fast`` selects it (tests/tiers.py); give those over Ray a second try.

    What is killed and restarted there are real processes on a machine that may stand still for a minute: one test in a
    thousand loses a race once. The second try is shown in the summary as RERUN, so that it gets looked at.
    """
    file = item.path.relative_to(Path(__file__).parent).as_posix()
    marks = {mark.name for mark in item.iter_markers()}
    tier = tiers.tier(file, marks)
    if tier != "all":
        item.add_marker(tier)
    if "ray" in marks:
        item.add_marker(pytest.mark.flaky(reruns=1))


@cache
def _starts_ray(file: Path, test: str) -> bool:
    """Whether a test, or its whole file, is marked ``ray``."""
    body = ast.parse(file.read_bytes()).body
    assigned = [node for node in body if isinstance(node, ast.Assign)]
    marks = [node.value for node in assigned if ast.unparse(node.targets[0]) == "pytestmark"]
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == test:
            marks += node.decorator_list
    return any("mark.ray" in ast.unparse(mark) for mark in marks)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A test that leaves more threads behind changes the last bits of those after it, which the golden ones see."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def real_processes() -> Iterator[None]:
    """Ray starts real Python processes here, not forks (tests/forks.py): for tests that look at the processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_RUNTIME_ENV_HOOK", raising=False)
        yield


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SDXL pipeline's folder; don't write into it."""
    return tiny.make_sdxl(tmp_path_factory.mktemp("tiny_sdxl"))


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SD1.5 pipeline's folder; don't write into it."""
    return tiny.make_sd15(tmp_path_factory.mktemp("tiny_sd15"))


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random SD3 pipeline's folder; don't write into it."""
    return tiny.make_sd3(tmp_path_factory.mktemp("tiny_sd3"))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random PickScore-format CLIPModel's folder; don't write into it."""
    return tiny.make_clip(tmp_path_factory.mktemp("tiny_clip"))


@pytest.fixture(scope="session")
def tiny_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 24 prompts."""
    return tiny.make_prompts(tmp_path_factory.mktemp("tiny_prompts"))


@pytest.fixture(scope="session")
def ray_instance() -> Iterator[None]:
    """A small Ray instance, shared: starting one takes seconds."""
    pytest.importorskip("ray")
    from rlhf_t2i.cluster import ray_cluster
    from rlhf_t2i.cluster.connect import start_local_ray, stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_cluster, "_START_LIMIT", ray_cluster.Limit(HANG_S, "the limit for starting"))
        start_local_ray(8)
        yield
        stop()


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_sdxl: Path, tiny_clip: Path, tiny_prompts: Path) -> Callable[..., Recipe]:
    """Build a tiny recipe; keyword arguments are ``--set`` overrides with ``__`` for dots."""

    def build(**overrides: Any) -> Recipe:
        text = f"""
seed: 3
steps: 3
models: {{reference: {tiny_sdxl}, generator: {tiny_sdxl}/unet, height: 16, width: 16}}
data: {{prompts: {tiny_prompts}}}
algorithm:
  cfg: {{guidance_scale: 3.0}}
  rewards: [{{name: pickscore, scale: 100, options: {{model: {tiny_clip}}}}}]
optimization:
  batch_size: 4
  generator: {{lr: 1.0e-3, eps: 1.0e-4}}
  assistant: {{lr: 1.0e-3, eps: 1.0e-4}}
placement: local
logging: {{samples_every: 2, sample_count: 4}}
checkpoints: {{every: 2}}
evaluation: {{images: 8, images_per_prompt: 2, batch_size: 4}}
"""
        path = tmp_path / "recipe.yaml"
        path.write_text(text, "utf-8")
        return reading.load(path, [f"{k.replace('__', '.')}={v}" for k, v in overrides.items()])

    return build
