"""The equalities that docs/algorithm.md promises, as whole roles compute them: path by path, weighting by weighting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_t2i.algorithm.losses import guidance_omega
from rlhf_t2i.algorithm.timesteps import TimestepLaw
from rlhf_t2i.cluster.local import LocalCluster
from rlhf_t2i.plugins import registry
from rlhf_t2i.recipe.schema import Guidance, Recipe
from rlhf_t2i.roles.assistant import AssistantRole
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.roles.reference import ReferenceRole

MakeRecipe = Callable[..., Recipe]
WEIGHTINGS = ("unit_x0", "inv_mean_abs", "score", "eps")
LAWS = {
    "default": None,
    "uniform": TimestepLaw("uniform"),
    "shifted": TimestepLaw("shifted", shift=3.0),
    "logit_normal": TimestepLaw("logit_normal", mean=0.4, std=1.2),
}
DIVERGENCES: list[tuple[str, dict[str, Any]]] = [("kl", {}), ("l2", {}), ("l2", {"alpha": 1.2}), ("pseudo_huber", {})]
NONE = [Guidance(guidance_scale=0), Guidance(guidance_scale=1), Guidance(mode="outer", guidance_scale=0)]


class World:
    """One learner with its denoisers, asked for the gradient at the same x_0 under different settings."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._cluster = recipe, LocalCluster(recipe)
        roles = self._cluster._worker.roles
        learner, reference, assistant = roles["learner"], roles["reference"], roles["assistant"]
        assert isinstance(learner, LearnerRole)
        assert isinstance(reference, ReferenceRole)
        assert isinstance(assistant, AssistantRole)
        noise = torch.Generator().manual_seed(1)
        for weight in assistant.engine.module.parameters():  # which begins as the reference, with no pull at all
            weight.detach().add_(0.02 * torch.randn(weight.shape, generator=noise))
        self._learner, self._reference = learner, reference
        shape = self._cluster._worker._context.store.latent_shape
        self._x0 = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))

    def gradient(
        self, cfg: Guidance, divergence: tuple[str, dict[str, Any]], weighting: str, law: TimestepLaw | None = None
    ) -> Tensor:
        """At x_0 of four samples; with several steps each sample is at its own."""
        algorithm = self._recipe.algorithm.model_copy(update={"cfg": cfg, "weighting": weighting})
        self._learner._recipe = self._recipe.model_copy(update={"algorithm": algorithm})
        self._learner._divergence, self._learner._law = registry.divergence(divergence[0], **divergence[1]), law
        self._reference._omega = guidance_omega(cfg.guidance_scale, cfg.convention) if cfg.mode == "inner" else 1.0
        keys, prompts = [(0, "probe", i) for i in range(4)], ["a red cat", "a blue dog"] * 2
        depths = torch.arange(1, 5).clamp_max(self._recipe.student.steps)
        return self._cluster.call_all("learner", LearnerRole.gradient_at_x0, "t", self._x0, prompts, keys, {}, depths)[
            0
        ]


@pytest.fixture(scope="module", params=["vp", "flow"])
def models(request: pytest.FixtureRequest, tiny_sdxl: Path, tiny_sd3: Path) -> tuple[Path, str]:
    return (tiny_sdxl, "unet") if request.param == "vp" else (tiny_sd3, "transformer")


@pytest.fixture(params=[1, 4], ids=["one step", "four steps"])
def world(request: pytest.FixtureRequest, models: tuple[Path, str], make_recipe: MakeRecipe) -> World:
    reference, part = models
    changes = {"models__reference": str(reference), "models__generator": str(reference / part)}
    return World(make_recipe(**changes, algorithm__rewards="[]", student__steps=request.param))


@pytest.mark.parametrize("alpha", [0.5, 6.5])
def test_outer_guidance_of_kl_is_inner_guidance_with_one_more(world: World, alpha: float) -> None:
    """Under every weighting and law of the timesteps (1.5)."""
    for weighting in WEIGHTINGS:
        for name, law in LAWS.items():
            outer = world.gradient(Guidance(mode="outer", guidance_scale=alpha), ("kl", {}), weighting, law)
            inner = world.gradient(Guidance(guidance_scale=1 + alpha), ("kl", {}), weighting, law)
            assert float((outer - inner).norm() / inner.norm()) < 1e-5, (weighting, name)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_ways_to_write_the_same_guidance(world: World, divergence: tuple[str, dict[str, Any]]) -> None:
    """No guidance is scale 0, omega 1 and outer 0; ``one_plus`` adds 1; outer is another method but for KL (1.5)."""
    for weighting in WEIGHTINGS:
        plain, *others = (world.gradient(cfg, divergence, weighting) for cfg in NONE)
        for other in others:
            assert float((other - plain).norm() / plain.norm()) < 1e-5, weighting
        omega = world.gradient(Guidance(guidance_scale=3), divergence, weighting)
        added = world.gradient(Guidance(guidance_scale=2, convention="one_plus"), divergence, weighting)
        torch.testing.assert_close(added, omega, rtol=0, atol=0)
        outer = world.gradient(Guidance(mode="outer", guidance_scale=2), divergence, weighting)
        assert (float((outer - omega).norm() / omega.norm()) < 1e-5) == (divergence[0] == "kl"), weighting
