"""What must not be detached (algorithm.md 1.4 and 4.4): the biases that each mistake causes, and the guard."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rlhf_t2i.algorithm.losses import Denoiser, divergence_loss, divergence_loss_from_predictions
from rlhf_t2i.algorithm.schedules import PREDICTION_TYPES, FlowSchedule, Schedule, VPSchedule
from rlhf_t2i.plugins import registry
from rlhf_t2i.roles.denoiser import Branch, DenoiserServer
from tests.math.gaussian import AT, MU, SCHEDULE, WORLDS, M, R, S, World, golden

# dL/ds at theta = ref when only the teacher runs without gradient, one dimension, variance preserving.
TEACHER_BIAS = {20: -3.7539, 249: -1.8866, 499: -0.5484, 979: -0.0095}
WITH_SIGNAL = [(path, t) for path, t in AT if WORLDS[path].at(t).a > 0]


def detached(inner: Denoiser, schedule: Schedule) -> Denoiser:
    """The DMD habit: the network's noise prediction under no_grad, converted with a live x_t."""

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.coefficients(t, x_t)
        with torch.no_grad():
            epsilon = (x_t - alpha * inner(x_t, t)) / sigma
        return (x_t - sigma * epsilon) / alpha

    return predict


def without_graph(inner: Denoiser) -> Denoiser:
    """The whole denoiser under no_grad."""

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return inner(x_t, t)

    return predict


@pytest.mark.parametrize(("path", "t"), AT)
@pytest.mark.parametrize("name", ["l2", "pseudo_huber", "kl"])
def test_gradient_vanishes_at_the_reference(name: str, path: str, t: float) -> None:
    """Fails by the values of TEACHER_BIAS if the code detaches the teacher."""
    _, gradient = WORLDS[path].regularizer(name, M, R, t)
    assert gradient == pytest.approx((0, 0), abs=1e-11)


def detached_reference(world: World) -> Denoiser:
    """The reference's denoiser, its network under no_grad."""
    return detached(world.denoiser(M, R), world.schedule)


@pytest.mark.parametrize(("path", "t"), WITH_SIGNAL)
def test_a_detached_teacher_is_biased_at_the_reference(path: str, t: float) -> None:
    world, at = WORLDS[path], WORLDS[path].at(t)
    _, gradient = world.regularizer("l2", M, R, t, reference=detached_reference(world))
    assert gradient[1] == pytest.approx(-2 * at.a**2 * R / at.u**2, rel=1e-9)
    assert gradient[0] == pytest.approx(0, abs=1e-10)
    if path == "vp" and t in TEACHER_BIAS:
        assert gradient[1] == pytest.approx(TEACHER_BIAS[int(t)], abs=6e-5)


@pytest.mark.parametrize(("path", "t"), WITH_SIGNAL)
def test_a_detached_assistant_is_biased_the_other_way(path: str, t: float) -> None:
    world, at = WORLDS[path], WORLDS[path].at(t)
    _, gradient = world.regularizer("l2", M, R, t, assistant=detached_reference(world))
    assert gradient[1] == pytest.approx(2 * at.a**2 * R / at.u**2, rel=1e-9)


@pytest.mark.parametrize(("path", "t"), [("vp", 20), ("vp", 499), ("flow", 499.5)])
@pytest.mark.parametrize("name", ["l2", "pseudo_huber"])
def test_the_cotangent_reaches_both_denoisers(name: str, path: str, t: float) -> None:
    """Each denoiser answers one vector-Jacobian product; the KL force asks for none."""
    world = WORLDS[path]
    calls: list[str] = []

    def watched(label: str, inner: Denoiser) -> Denoiser:
        def predict(x_t: Tensor, times: Tensor) -> Tensor:
            out = inner(x_t, times)
            if out.requires_grad:
                out.register_hook(lambda _: calls.append(label))
            return out

        return predict

    def run(divergence: str) -> None:
        x0 = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        psi, ref = watched("assistant", world.denoiser(MU, S)), watched("reference", world.denoiser(M, R))
        noise = torch.ones_like(x0)
        divergence_loss(divergence, x0, world.tensor(t, 3), noise, psi, ref, world.schedule).sum().backward()

    run(name)
    assert sorted(calls) == ["assistant", "reference"]
    calls.clear()
    run("kl")
    assert calls == []


@pytest.mark.parametrize("path", WORLDS)
@pytest.mark.parametrize("name", ["l2", "pseudo_huber"])
def test_two_denoisers_without_a_graph_are_refused(name: str, path: str) -> None:
    """Otherwise the run would silently train Diff-Instruct, or the reward alone."""
    world, schedule = WORLDS[path], WORLDS[path].schedule
    x0 = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)
    t, noise = torch.full((4,), 499), torch.ones(4, 1, dtype=torch.float64)
    psi, ref = world.denoiser(MU, S), world.denoiser(M, R)
    with pytest.raises(RuntimeError, match="no_grad"):
        divergence_loss(name, x0, t, noise, without_graph(psi), without_graph(ref), schedule)
    x_t = schedule.add_noise(x0, noise, t).detach()
    with pytest.raises(RuntimeError, match="no_grad"):
        divergence_loss_from_predictions(registry.divergence(name), x0, t, psi(x_t, t), ref(x_t, t), schedule)


@pytest.mark.parametrize("kind", [*PREDICTION_TYPES, "flow"])
def test_a_role_whose_network_runs_without_a_graph_is_refused(kind: str) -> None:
    """The DMD habit in a role: its prediction still depends on a live x_t, so nothing later can see the mistake."""
    schedule: Schedule = FlowSchedule() if kind == "flow" else VPSchedule(SCHEDULE.alphas_cumprod, kind)
    network = torch.nn.Linear(2, 2).double().requires_grad_(False)

    def role(live: bool) -> DenoiserServer:
        def predict(x_t: Tensor, t: Tensor, prompts: Sequence[str], branch: Branch) -> Tensor:
            with torch.set_grad_enabled(live and torch.is_grad_enabled()):
                raw = network(x_t)
            return schedule.to_x0(raw, x_t, t)

        return DenoiserServer(predict)

    x_t, t = torch.ones(3, 2, dtype=torch.float64), torch.full((3,), 499)
    arguments = ("request_id", x_t, t, [""] * 3, "conditional")
    assert role(live=True).vjp(*arguments, torch.ones_like(x_t)).shape == x_t.shape
    with pytest.raises(RuntimeError, match="no_grad"):
        role(live=False).vjp(*arguments, torch.ones_like(x_t))
    assert torch.equal(role(live=False).forward(*arguments, False), role(live=True).forward(*arguments, True))


@pytest.mark.parametrize(("path", "t"), [("vp", 20), ("vp", 499), ("flow", 499.5)])
def test_two_networks_under_no_grad_leave_no_force(path: str, t: float) -> None:
    """Why this matters: what remains is no gradient at all, so a run would maximize the reward alone."""
    world = WORLDS[path]
    psi, ref = (detached(inner, world.schedule) for inner in (world.denoiser(MU, S), world.denoiser(M, R)))
    _, gradient = world.regularizer("l2", MU, S, t, reference=ref, assistant=psi)
    assert gradient == pytest.approx((0, 0), abs=1e-10)


def test_what_the_guard_prevents_is_diff_instruct() -> None:
    """x0-form with everything detached is exactly the KL gradient times 2 / g_t^2 (algorithm.md 1.4, fact 3)."""
    for t in (20, 249, 499, 979):
        g, v = WORLDS["vp"].at(t).g, WORLDS["vp"].at(t).v
        kl = golden()[str(t)]["grad_KL"]
        correct = golden()[str(t)]["grad_L2_frozen"]
        assert 2 / g**2 * kl[0] / correct[0] == pytest.approx(v / g**2, rel=1e-12)
        assert 2 / g**2 * kl[1] / correct[1] == pytest.approx(v / (2 * g**2), rel=1e-12)


def test_no_graph_is_asked_for_in_evaluation() -> None:
    """Without a gradient on x0 (logging the value), detached denoisers are fine."""
    x0, t = torch.zeros(4, 1, dtype=torch.float64), torch.full((4,), 499)
    world = WORLDS["vp"]
    loss = divergence_loss("l2", x0, t, torch.ones_like(x0), world.denoiser(MU, S), world.denoiser(M, R), SCHEDULE)
    assert not loss.requires_grad
