"""SiD's alpha: the published formula, and the closed forms of both gradients (algorithm.md 1.4 and 4.2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_t2i.algorithm.losses import divergence_loss, two_stage_gradient
from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins import registry
from tests.math.gaussian import AT, MU, SCHEDULE, WORLDS, S, golden
from tests.math.test_forms import PATHS, Smooth, both_paths, inputs
from tests.math.test_theorem import huber

TIMESTEPS = torch.tensor([20, 499, 979])


@both_paths
@pytest.mark.parametrize("alpha", [1.0, 0.5, 1.2, 0.0])
@pytest.mark.parametrize("weighting", ["unit_x0", "inv_mean_abs"])
def test_the_loss_is_twice_that_of_sid(alpha: float, weighting: Any, path: str) -> None:
    """``(D_q - D_p) [(D_q - x0) - alpha (D_q - D_p)]``, D_q the reference's prediction and D_p the assistant's."""
    schedule = PATHS[path]
    x0, noise = inputs()
    psi, ref = Smooth(1), Smooth(2)
    loss = divergence_loss(
        registry.divergence("l2", alpha=alpha), x0, TIMESTEPS, noise, psi, ref, schedule, weighting
    )  # fmt: skip
    x_t = schedule.add_noise(x0, noise, TIMESTEPS)
    d_p, d_q = psi(x_t, TIMESTEPS), ref(x_t, TIMESTEPS)
    sid = ((d_q - d_p) * ((d_q - x0) - alpha * (d_q - d_p))).flatten(1).sum(1)
    if weighting == "inv_mean_abs":
        sid = sid / (x0 - d_q).detach().abs().flatten(1).mean(1)
    torch.testing.assert_close(loss, 2 * sid, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(two_stage_gradient(loss, x0), two_stage_gradient(2 * sid, x0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("path", "t"), AT)
def test_one_half_is_the_full_gradient_of_the_fisher_divergence(path: str, t: float) -> None:
    _, gradient = WORLDS[path].regularizer(registry.divergence("l2", alpha=0.5), MU, S, t)
    assert gradient == pytest.approx(WORLDS[path].at(t).l2_full(), abs=1e-10, rel=1e-10)


@pytest.mark.parametrize(("path", "t"), AT)
def test_one_is_the_frozen_gradient_and_the_default(path: str, t: float) -> None:
    _, gradient = WORLDS[path].regularizer(registry.divergence("l2", alpha=1.0), MU, S, t)
    assert gradient == pytest.approx(WORLDS[path].at(t).l2_frozen(), abs=1e-10, rel=0)
    assert gradient == WORLDS[path].regularizer("l2", MU, S, t)[1]


@pytest.mark.parametrize("t", [99, 499])
def test_path_weight_gives_any_divergence_its_full_gradient(t: int) -> None:
    divergence: Any = huber(WORLDS["vp"], 1.0, t)
    divergence.path_weight = 1.0
    _, gradient = WORLDS["vp"].regularizer(divergence, MU, S, t)
    assert gradient == pytest.approx(golden()[str(t)]["PH_c1.0"]["grad_full"], abs=1e-9, rel=1e-9)


def test_the_force_reaches_both_denoisers() -> None:
    x0 = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    reached: list[str] = []

    def watched(name: str) -> Any:
        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            out = 0.5 * x_t
            out.register_hook(lambda _: reached.append(name))
            return out

        return predict

    noise, t = torch.ones(2, 1, dtype=torch.float64), torch.tensor([99, 499])
    divergence = registry.divergence("l2", alpha=1.2)
    divergence_loss(divergence, x0, t, noise, watched("psi"), watched("ref"), SCHEDULE).sum().backward()
    assert sorted(reached) == ["psi", "ref"]


@pytest.mark.parametrize("alpha", ["high", 11, None])
def test_a_wrong_alpha_is_refused(alpha: Any) -> None:
    with pytest.raises(UsageError, match="divergence 'l2': alpha: "):
        registry.divergence("l2", alpha=alpha)
