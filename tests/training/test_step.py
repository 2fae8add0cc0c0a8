"""One step in one process: what it leaves out, repeats and splits without changing the result."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch

from rlhf_t2i.cluster.local import LocalCluster
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.learner import LearnerRole

MakeRecipe = Callable[..., Recipe]


def test_generator_step_leaves_no_gradient_outside_theta(make_recipe: MakeRecipe) -> None:
    cluster = LocalCluster(make_recipe())
    cluster.call_all("learner", LearnerRole.step, 0, ["a red cat"] * 4)
    roles = cluster._worker.roles
    networks = [
        roles["assistant"].engine.module,
        roles["reference"]._network,
        *roles["reward"].rewards.values(),
        cluster._worker._context.store.decoder,
    ]
    for network in networks:
        assert all(parameter.grad is None for parameter in network.parameters())


def test_kl_computes_no_vector_jacobian_product(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_t2i.roles.denoiser import DenoiserServer

    calls: list[str] = []
    original = DenoiserServer.vjp

    @wraps(original)
    def counted(server: DenoiserServer, *args: Any) -> Any:
        calls.append("vjp")
        return original(server, *args)

    monkeypatch.setattr(DenoiserServer, "vjp", counted)
    for name, expected in (("kl", 0), ("pseudo_huber", 2)):
        calls.clear()
        cluster = LocalCluster(make_recipe(algorithm__divergence__name=name))
        cluster.call_all("learner", LearnerRole.step, 0, ["a red cat"] * 4)
        assert len(calls) == expected, name


def test_inner_guidance_of_kl_equals_outer(make_recipe: MakeRecipe) -> None:
    """Choice 1 with alpha equals Choice 2 with omega = 1 + alpha for KL (algorithm.md 1.5)."""
    keys = [(0, "probe", i) for i in range(4)]
    x0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for cfg in ("{mode: inner, guidance_scale: 2.0, convention: one_plus}", "{mode: outer, guidance_scale: 2.0}"):
        cluster = LocalCluster(
            make_recipe(algorithm__cfg=cfg, algorithm__divergence__name="kl", algorithm__rewards="[]")
        )
        found.append(cluster.call_all("learner", LearnerRole.gradient_at_x0, "t", x0, ["a red cat"] * 4, keys, {})[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_lost_graph_is_recomputed(make_recipe: MakeRecipe) -> None:
    """A denoiser that restarted between forward and product gives the same product."""
    cluster = LocalCluster(make_recipe())
    server = cluster._worker.roles["reference"]
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([100, 700])
    request = ("request_id", x_t, t, ["a red cat", "a blue dog"], "guided")
    cotangent = server.forward(*request, True)
    expected = server.vjp(*request, cotangent)
    assert not server._graphs
    torch.testing.assert_close(server.vjp(*request, cotangent), expected, rtol=0, atol=0)


def test_micro_batches_do_not_change_the_step(make_recipe: MakeRecipe) -> None:
    found = []
    for micro in (4, 2, 1):
        cluster = LocalCluster(make_recipe(optimization__micro_batch=micro))
        cluster.call_all("learner", LearnerRole.step, 0, ["a red cat", "a blue dog"] * 2)
        weights = cluster.call_all("learner", LearnerRole.weights, "raw")[0]
        found.append(torch.cat([w.flatten() for w in weights.values()]))
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) < 1e-5
