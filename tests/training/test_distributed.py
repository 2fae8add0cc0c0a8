"""Distributed equals local: gradient at x_0, parameter gradients, ten steps; float32, 1e-5 relative."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from rlhf_t2i.algorithm import rng
from rlhf_t2i.cluster.base import Cluster
from rlhf_t2i.cluster.local import LocalCluster
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.assistant import AssistantRole
from rlhf_t2i.roles.generator import GeneratorRole
from rlhf_t2i.roles.learner import LearnerRole

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPTS = [f"a {color} cat" for color in ("red", "blue", "green", "gold")]
# (learner ranks, assistant ranks, ZeRO stage): both rank counts at both roles, and every stage. One rank each is the
# resumed run of test_restore.py; ZeRO-3 over two learners is below.
LAYOUTS = [(2, 2, 1), (2, 1, 2), (1, 2, 3)]


def ray_recipe(make_recipe: Callable[..., Recipe], learner: int, assistant: int, zero: int, **more: Any) -> Recipe:
    groups = (
        f"{{learn: {{devices: {learner}, roles: [learner, generator], threads: 1}}, "
        f"assist: {{devices: {assistant}, roles: [assistant], threads: 1}}, "
        "score: {devices: 1, roles: [reference, reward], threads: 1}}"
    )
    return make_recipe(
        placement__mode="ray", placement__groups=groups, optimization__zero_stage=zero,
        optimization__micro_batch=1, **more,
    )  # fmt: skip


def together(make_recipe: Callable[..., Recipe], zero: int, **more: Any) -> Recipe:
    """Two ranks with all roles each: where only the learner's ranks matter, more processes would cost imports alone."""
    groups = "{all: {devices: 2, roles: [learner, generator, assistant, reference, reward], threads: 1}}"
    return make_recipe(
        placement__mode="ray", placement__groups=groups, optimization__zero_stage=zero,
        optimization__micro_batch=1, **more,
    )  # fmt: skip


def start_ray(recipe: Recipe) -> Cluster:
    from rlhf_t2i.cluster.ray_cluster import RayCluster

    return RayCluster(recipe)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def gradient(cluster: Cluster, recipe: Recipe) -> Tensor:
    keys = [(recipe.seed, "probe", i) for i in range(4)]
    x0 = rng.normal((4, 8, 8), keys)
    return cluster.call_all("learner", LearnerRole.gradient_at_x0, "probe", x0, PROMPTS, keys, {})[0]


def train(cluster: Cluster, steps: int) -> Tensor:
    for step in range(steps):
        cluster.call_all("assistant", AssistantRole.train, step, PROMPTS)
        cluster.call_all("learner", LearnerRole.step, step, PROMPTS)
        cluster.sync_generator()
    return flat(cluster.call_all("learner", LearnerRole.weights, "raw")[0])


@pytest.mark.parametrize(("learner", "assistant", "zero"), LAYOUTS)
def test_ten_steps_equal_local(
    ray_instance: None, make_recipe: Callable[..., Recipe], learner: int, assistant: int, zero: int
) -> None:
    local_recipe = make_recipe()
    local = LocalCluster(local_recipe)
    start = flat(local.call_all("learner", LearnerRole.weights, "raw")[0])
    expected_gradient = gradient(local, local_recipe)
    expected = train(local, 10)
    assert relative(expected, start) > 1e-3  # ten steps do move the weights

    recipe = ray_recipe(make_recipe, learner, assistant, zero)
    cluster = start_ray(recipe)
    try:
        assert relative(gradient(cluster, recipe), expected_gradient) < 1e-5
        assert relative(train(cluster, 10), expected) < 1e-5
    finally:
        cluster.close()


def test_a_four_step_generator_equals_local(ray_instance: None, make_recipe: Callable[..., Recipe]) -> None:
    """Which step of a sample is trained does not depend on ranks; under ZeRO-3 all of them call as often."""
    local = LocalCluster(make_recipe(student__steps=4))
    expected = train(local, 3)
    cluster = start_ray(together(make_recipe, 3, student__steps=4))
    try:
        assert relative(train(cluster, 3), expected) < 1e-5
        keys = [(0, "sample", i) for i in range(3)]
        for rollout in (False, True):
            ours, theirs = (
                c.clients("generator")[0].submit(GeneratorRole.sample, PROMPTS[:3], keys, "raw", rollout).result()
                for c in (cluster, local)
            )
            assert relative(ours, theirs) < 1e-5
    finally:
        cluster.close()


# With an epsilon far above the gradients, one AdamW step is the gradient itself, times lr / eps.
PLAIN_GRADIENT = {
    "optimization__generator": "{lr: 1.0e+6, eps: 1.0e+3, max_grad_norm: 1.0e+9, betas: [0.0, 0.0]}",
    "optimization__batch_size": 4,
}


@pytest.mark.parametrize("zero", [2, 3])
def test_parameter_gradients_equal_local(ray_instance: None, make_recipe: Callable[..., Recipe], zero: int) -> None:
    local = LocalCluster(make_recipe(**PLAIN_GRADIENT))
    start = flat(local.call_all("learner", LearnerRole.weights, "raw")[0])
    local.call_all("learner", LearnerRole.step, 0, PROMPTS)
    expected = flat(local.call_all("learner", LearnerRole.weights, "raw")[0]) - start

    cluster = start_ray(together(make_recipe, zero, **PLAIN_GRADIENT))
    try:
        cluster.call_all("learner", LearnerRole.step, 0, PROMPTS)
        moved = flat(cluster.call_all("learner", LearnerRole.weights, "raw")[0]) - start
    finally:
        cluster.close()
    assert relative(moved, expected) < 1e-5


def test_separate_generator_group_gets_the_learners_weights(
    ray_instance: None, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    groups = (
        "{learn: {roles: [learner, reference, reward], threads: 1}, "
        "sample: {devices: 2, roles: [generator], threads: 1}, assist: {devices: 2, roles: [assistant]}}"
    )
    local = LocalCluster(make_recipe())
    expected = train(local, 3)
    cluster: Any = start_ray(
        make_recipe(placement__mode="ray", placement__groups=groups, placement__step_timeout_s=7200)
    )
    try:
        assert relative(train(cluster, 3), expected) < 1e-5
        keys = [(0, "sample", i) for i in range(3)]
        ours, theirs = (c.sample(PROMPTS[:3], keys, "raw") for c in (cluster, local))
        assert relative(ours, theirs) < 1e-5
        found = ray.get(cluster._actors["assist"][1].__ray_call__.remote(settings))
    finally:
        cluster.close()
    threads, timeouts = found
    assert threads == max(1, len(os.sched_getaffinity(0)) // 5)  # a fair share for each of five processes on this node
    assert len(timeouts) > 1  # torch's world and DeepSpeed's groups
    assert set(timeouts) == {7200.0 + 60.0}


def settings(actor: Any) -> tuple[int, list[float]]:
    """Threads of an actor's process, and the timeout of each of its process groups."""
    groups = torch.distributed.distributed_c10d._world.pg_map
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return torch.get_num_threads(), [backend.options._timeout.total_seconds() for backend in backends]
