"""A reward that leaks until the process gets no more memory: the run names it, and goes on from its checkpoint."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rlhf_t2i.errors import RunError
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import checkpoints, run
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.metrics import Metrics
from rlhf_t2i.training.state import TrainState
from tests.training.test_run import metrics, model_bytes

LEAKY = """
import torch
from rlhf_t2i import plugins

kept = []


class Leaky(plugins.Reward):
    uses_prompt = False

    def score(self, images, prompts):
        kept.append(torch.empty(2**26))
        return images.mean((1, 2, 3))
"""
ROOM = 2**30


class Limit(TrainCallback):
    """Bounds the address space of this process after the second step: nothing of the machine's memory is used."""

    def on_step(self, state: TrainState, metrics: Metrics) -> None:
        if state.step == 2:
            now = psutil.Process().memory_info().vms
            resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))


@pytest.fixture(autouse=True)
def unlimited_afterwards() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_leak_ends_the_run_by_name_and_the_resumed_one_is_bit_identical(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    (tmp_path / "leaky.py").write_text(LEAKY, "utf-8")
    recipe = make_recipe(
        steps=10,
        algorithm__rewards=f"[{{name: '{tmp_path}/leaky.py:Leaky', label: leaky}}]",
        checkpoints__every=1,
        evaluation="{images: 2, images_per_prompt: 2, batch_size: 2}",
    )
    with pytest.raises(RunError, match=r"leaky.*failed on the prompt .*leaky\.py:12: .*(can't|not enough)"):
        run.run(recipe, tmp_path / "out", callback=Limit())
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    folder, state, damaged = checkpoints.find(tmp_path / "out")
    assert folder is not None
    assert 2 <= state.step < 10
    assert damaged == []
    run.run(recipe, tmp_path / "out", resume=True)
    run.run(recipe, tmp_path / "whole")
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "whole")
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
