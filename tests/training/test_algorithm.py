"""Algorithm 1 written a second time, plainly and in one graph, against what the roles and the controller do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm import prompts, rng
from rlhf_t2i.cluster.local import LocalCluster
from rlhf_t2i.engines.base import learning_rate
from rlhf_t2i.engines.local import LocalEngine
from rlhf_t2i.recipe.schema import Optimizer, Recipe
from rlhf_t2i.roles.assistant import AssistantRole
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.training import run
from tests import tiny

MakeRecipe = Callable[..., Recipe]
PROMPTS = ["a red cat", "a blue dog", "a green bird", "a gold fish"]
# With an epsilon far above the gradients, one AdamW step is the gradient itself.
PLAIN = "{lr: 1.0e+6, eps: 1.0e+6, max_grad_norm: 1.0e+9, betas: [0.0, 0.0]}"


def three_rewards(clip: Path) -> str:
    """Two rewards of images and one of latents, as a recipe's text."""
    return (
        f"[{{name: pickscore, scale: 100, options: {{model: {clip}}}}}, "
        f"{{name: clip, scale: 30, options: {{model: {clip}}}}}, {{name: cfg_implicit, scale: 0.5}}]"
    )


@pytest.fixture
def build(make_recipe: MakeRecipe, tiny_sdxl: Path, tiny_clip: Path, tmp_path: Path) -> Callable[..., Networks]:
    """Three networks that differ, three rewards, two micro-batches."""
    generator = tiny.make_generator_bin(tiny_sdxl, tmp_path / "generator.bin")
    rewards = three_rewards(tiny_clip)

    def networks(**overrides: Any) -> Networks:
        settings = {
            "models__generator": str(generator), "algorithm__rewards": rewards, "optimization__micro_batch": 2,
            "optimization__generator": PLAIN, "optimization__assistant": PLAIN,
        }  # fmt: skip
        return Networks(make_recipe(**(settings | overrides)))

    return networks


class Networks:
    """A cluster, and the paper's formulas on its networks."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.cluster = recipe, LocalCluster(recipe)
        worker = self.cluster._worker
        self.theta: nn.Module = worker.roles["learner"].engine.module
        self.psi: nn.Module = worker.roles["assistant"].engine.module
        self.ref: nn.Module = worker.roles["reference"]._network
        self.rewards = worker.roles["reward"].rewards
        self.store = worker._context.store
        torch.manual_seed(7)
        with torch.no_grad():  # it starts as a copy of the reference, and the difference would vanish
            for parameter in self.psi.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))

    def noise_prediction(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        given = conditioning.tensors
        added = {"text_embeds": given["pooled_prompt_embeds"], "time_ids": given["time_ids"]}
        return network(x_t, t, given["prompt_embeds"], added_cond_kwargs=added, return_dict=False)[0]

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.store.schedule.alphas_cumprod[t].float().reshape(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def normal(self, *purpose: str | int) -> Tensor:
        streams = [torch.Generator().manual_seed(rng.seed_of(3, *purpose[:2], i, purpose[2])) for i in range(4)]
        return torch.stack([torch.randn(tiny.LATENTS, generator=stream) for stream in streams])

    def times(self, first: int, last: int, *purpose: str | int) -> Tensor:
        seeds = [rng.seed_of(3, *purpose[:2], i, purpose[2]) for i in range(4)]
        return torch.tensor([int(np.random.default_rng(seed).integers(first, last + 1)) for seed in seeds])

    def x0(self, role: str, count: int) -> Tensor:
        t = torch.full((4,), 399)
        a, g = self.coefficients(t)
        z = self.normal(role, count, "z")
        return (z - g * self.noise_prediction(self.theta, z, t, self.store.conditioner.encode(PROMPTS))) / a

    def predictions(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x0-predictions of the assistant, and of the reference with and without the prompts."""
        a, g = self.coefficients(t)
        prompted, empty = self.store.conditioner.encode(PROMPTS), self.store.conditioner.unconditional(4)
        pairs = ((self.psi, prompted), (self.ref, prompted), (self.ref, empty))
        found = [(x_t - g * self.noise_prediction(network, x_t, t, c)) / a for network, c in pairs]
        return found[0], found[1], found[2]

    def generator_loss(self, step: int, divergence: str, mode: str, implicit: float | Tensor = 0.5) -> Tensor:
        """Equation (3.8), (3.4) with L2, or section 3.1's, minus the scaled rewards; the mean over the batch."""
        x0 = self.x0("generator", step)
        t, eps = self.times(20, 979, "generator", step, "t"), self.normal("generator", step, "noise")
        a, g = self.coefficients(t)
        psi, conditional, unconditional = self.predictions(a * x0 + g * eps, t)
        guided = unconditional + 3.0 * (conditional - unconditional) if mode == "inner" else conditional
        delta = psi - guided
        if divergence == "kl":
            loss = delta.detach() * x0
        elif divergence == "l2":
            loss = -2 * delta * (psi - x0)
        else:
            c = 5.4e-4 * delta[0].numel() ** 0.5
            loss = -delta / (delta.square().sum((1, 2, 3), keepdim=True) + c * c).sqrt() * (psi - x0)
        if mode == "outer":
            loss = loss + 3.0 * (unconditional - conditional).detach() * x0
        images = self.store.decoder.decode(x0)
        pickscore, clip = (self.rewards[name].score(images, PROMPTS) for name in ("pickscore", "clip"))
        # The implicit reward has a timestep and a noise of its own (3.6).
        t = self.times(20, 979, "generator", step, "latent reward t")
        eps = self.normal("generator", step, "latent reward noise")
        a, g = self.coefficients(t)
        _, conditional, unconditional = self.predictions((a * x0 + g * eps).detach(), t)
        force = ((conditional - unconditional).detach() * x0).sum((1, 2, 3))
        return (loss.sum((1, 2, 3)) - implicit * force - 100 * pickscore - 30 * clip).mean()

    def assistant_loss(self, count: int) -> Tensor:
        """Denoising score matching with lambda(t) = g_t^2 on the generator's samples."""
        x0 = self.x0("assistant", count).detach()
        t, eps = self.times(0, 999, "assistant", count, "t"), self.normal("assistant", count, "noise")
        a, g = self.coefficients(t)
        found = self.noise_prediction(self.psi, a * x0 + g * eps, t, self.store.conditioner.encode(PROMPTS))
        return (found - eps).square().mean()


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradient(loss: Tensor, network: nn.Module) -> Tensor:
    return flat(torch.autograd.grad(loss, list(network.parameters())))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize(
    ("divergence", "mode"), [("pseudo_huber", "inner"), ("l2", "inner"), ("l2", "outer"), ("kl", "inner")]
)
def test_a_generator_step_descends_the_papers_gradient(
    build: Callable[..., Networks], divergence: str, mode: str
) -> None:
    networks = build(algorithm__divergence__name=divergence, algorithm__cfg=f"{{mode: {mode}, guidance_scale: 3.0}}")
    expected = gradient(networks.generator_loss(5, divergence, mode), networks.theta)
    before = flat(networks.theta.parameters())
    (report,) = networks.cluster.call_all("learner", LearnerRole.step, 5, PROMPTS)
    assert_close(before - flat(networks.theta.parameters()), expected)
    assert report.grad_norm == pytest.approx(float(expected.norm()), rel=1e-3)


def test_an_assistant_round_descends_the_noise_error(build: Callable[..., Networks]) -> None:
    networks = build()
    loss = networks.assistant_loss(5)
    expected = gradient(loss, networks.psi)
    before = flat(networks.psi.parameters())
    (report,) = networks.cluster.call_all("assistant", AssistantRole.train, 5, PROMPTS)
    assert_close(before - flat(networks.psi.parameters()), expected)
    assert report.loss == pytest.approx(loss.item(), rel=1e-4)


def test_gradients_are_clipped_by_their_global_norm() -> None:
    module = nn.Linear(3, 2)
    settings = Optimizer(lr=1e6, eps=1e6, max_grad_norm=0.5, betas=[0.0, 0.0], warmup_steps=4)
    engine = LocalEngine(module, settings, accumulation=1)
    before = flat(module.parameters())
    engine.backward(module(torch.ones(1, 3)).sum())
    assert engine.step(settings.lr) == pytest.approx(8**0.5)
    assert float((flat(module.parameters()) - before).norm()) == pytest.approx(0.5, rel=1e-4)
    assert [learning_rate(settings, step) / settings.lr for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]


def test_the_average_has_its_half_life_in_images(build: Callable[..., Networks]) -> None:
    """SiD's rule: beta = 0.5^(B / min(half-life, ramp-up x images seen))."""
    networks = build(optimization__ema="{half_life_kimg: 0.006, rampup: 0.5}")
    expected, moved = flat(networks.theta.parameters()), []
    for step in range(4):
        networks.cluster.call_all("learner", LearnerRole.step, step, PROMPTS)
        beta = 0.5 ** (4 / min(6, 0.5 * 4 * (step + 1)))
        live = flat(networks.theta.parameters())
        moved.append(live)
        expected = beta * expected + (1 - beta) * live
    averaged = networks.cluster.call_all("learner", LearnerRole.weights, "ema")[0]
    found = flat(averaged[name] for name, _ in networks.theta.named_parameters())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert float((moved[0] - moved[-1]).norm()) > 100 * float((found - expected).norm())


def test_every_update_has_a_number_and_prompts_of_its_own(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K rounds before each generator step, more before the first; nothing comes twice, or noise would be shared."""
    calls: list[tuple[Any, ...]] = []
    original = LocalCluster.submit_all

    def recorded(cluster: LocalCluster, role: str, method: Callable[..., Any], *args: Any) -> Any:
        if method in (AssistantRole.train, LearnerRole.step):
            calls.append((role, *args))
        return original(cluster, role, method, *args)

    monkeypatch.setattr(LocalCluster, "submit_all", recorded)
    recipe = make_recipe(steps=2, algorithm__assistant_steps=2, algorithm__assistant_warmup=1)
    run.run(recipe, tmp_path / "out")

    def stream(role: str, purpose: str) -> Iterator[tuple[Any, ...]]:
        epoch, number = prompts.PromptStream(prompts.read(recipe.data.prompts), recipe.seed, purpose), 0
        while True:
            yield role, number, epoch.batch(4 * number, 4)
            number += 1

    learner, assistant = stream("learner", "generator"), stream("assistant", "assistant")
    assert calls == [next({"l": learner, "a": assistant}[letter]) for letter in "aaalaal"]


def test_streams_differ_by_every_part_of_their_key() -> None:
    keys = [(3, "generator", 5, 0, "z"), (4, "generator", 5, 0, "z"), (3, "assistant", 5, 0, "z"),
            (3, "generator", 6, 0, "z"), (3, "generator", 5, 1, "z"), (3, "generator", 5, 0, "noise")]  # fmt: skip
    draws = rng.normal((8,), keys)
    assert torch.pdist(draws).min() > 0.1
    assert torch.equal(rng.normal((8,), keys[3:4])[0], draws[3])
    assert set(rng.timesteps(20, 22, [(0, i) for i in range(50)]).tolist()) == {20, 21, 22}
