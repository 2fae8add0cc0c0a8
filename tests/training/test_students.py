"""Students of K steps in training: the step that is trained, its law, rewards on the last step, v-prediction models."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from scipy import stats
from torch import Tensor

from rlhf_t2i.algorithm import rng
from rlhf_t2i.algorithm.student import Student
from rlhf_t2i.cluster.local import LocalCluster
from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import models
from rlhf_t2i.families.export import write_model
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe.schema import Models, Recipe, StudentSettings
from rlhf_t2i.roles.assistant import AssistantRole
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.training import run
from rlhf_t2i.training.callbacks import TrainCallback
from tests import tiny
from tests.families.test_sampling import PROMPTS, sequential, store
from tests.math.gaussian import SCHEDULE
from tests.training.test_algorithm import PLAIN, Networks, assert_close, flat, gradient, three_rewards
from tests.training.test_algorithm import PROMPTS as FOUR

MakeRecipe = Callable[..., Recipe]
STEPS = (999, 749, 499, 249)


class FewSteps(Networks):
    """Algorithm 1 for a generator of four steps, written a second time: sample by sample, steps in a plain loop."""

    def depths(self, role: str, count: int) -> list[int]:
        seeds = [rng.seed_of(3, role, count, i, "z", "depth") for i in range(4)]
        return [int(np.random.default_rng(seed).integers(1, 5)) for seed in seeds]

    def x0(self, role: str, count: int) -> Tensor:
        deterministic = self.recipe.student.transition == "deterministic"
        found = []
        for i, depth in enumerate(self.depths(role, count)):
            x = self.normal(role, count, "z")[i : i + 1]
            cond = self.store.conditioner.encode([FOUR[i]])
            for k in range(1, depth + 1):
                t = torch.tensor([STEPS[k - 1]])
                a, g = self.coefficients(t)
                with torch.set_grad_enabled(k == depth):
                    noise = self.noise_prediction(self.theta, x, t, cond)
                    x0 = (x - g * noise) / a
                if k < depth:
                    stream = torch.Generator().manual_seed(rng.seed_of(3, role, count, i, "z", f"step {k}"))
                    fresh = torch.randn(1, *tiny.LATENTS, generator=stream)
                    a, g = self.coefficients(torch.tensor([STEPS[k]]))
                    x = a * x0 + g * (noise if deterministic else fresh)
            found.append(x0)
        return torch.cat(found)


@pytest.fixture
def build(make_recipe: MakeRecipe, tiny_sdxl: Path, tiny_clip: Path, tmp_path: Path) -> Callable[..., FewSteps]:
    """A four-step generator from a bare state dict, as DMD2 publishes it."""
    generator = tiny.make_generator_bin(tiny_sdxl, tmp_path / "dmd2_sdxl_4step_unet_fp16.bin")
    rewards = three_rewards(tiny_clip)

    def networks(**overrides: Any) -> FewSteps:
        settings = {
            "models__generator": str(generator), "algorithm__rewards": rewards, "optimization__micro_batch": 2,
            "optimization__generator": PLAIN, "optimization__assistant": PLAIN, "student__steps": 4,
        }  # fmt: skip
        return FewSteps(make_recipe(**(settings | overrides)))

    return networks


MIXED = next(
    step
    for step in range(99)
    if {1, 4}
    < {int(np.random.default_rng(rng.seed_of(3, "generator", step, i, "z", "depth")).integers(1, 5)) for i in range(4)}
)
"""A step whose samples have at least three depths, the first and the last among them."""


@pytest.mark.parametrize("transition", ["stochastic", "deterministic"])
def test_the_gradient_reaches_the_last_step_alone(build: Callable[..., FewSteps], transition: str) -> None:
    """Backward simulation: the step at a sample's own depth has a graph, those before it have none."""
    networks = build(student__transition=transition)
    expected = gradient(networks.generator_loss(MIXED, "pseudo_huber", "inner"), networks.theta)
    before = flat(networks.theta.parameters())
    networks.cluster.call_all("learner", LearnerRole.step, MIXED, FOUR)
    assert_close(before - flat(networks.theta.parameters()), expected)


def test_a_graph_through_all_steps_would_give_another_gradient(
    build: Callable[..., FewSteps], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the test above would show nothing."""
    networks = build()
    expected = gradient(networks.generator_loss(MIXED, "pseudo_huber", "inner"), networks.theta)
    monkeypatch.setattr(torch, "set_grad_enabled", lambda _: torch.enable_grad())
    whole = gradient(networks.generator_loss(MIXED, "pseudo_huber", "inner"), networks.theta)
    assert float((whole - expected).norm() / expected.norm()) > 0.02


def test_rewards_of_the_last_step_alone(build: Callable[..., FewSteps], monkeypatch: pytest.MonkeyPatch) -> None:
    """``reward_steps: last``: other samples follow the divergence only; their rewards are still measured."""
    networks = build(algorithm__reward_steps="last")
    last = torch.tensor(networks.depths("generator", MIXED)) == 4
    assert 0 < int(last.sum()) < 4
    for reward in networks.rewards.values():
        score = reward.score
        monkeypatch.setattr(reward, "score", lambda images, prompts, score=score: score(images, prompts) * last)
    # The implicit reward is a LatentReward of the learner: mask it by its scale.
    expected = gradient(networks.generator_loss(MIXED, "l2", "inner", implicit=0.5 * last), networks.theta)
    monkeypatch.undo()
    networks = build(algorithm__reward_steps="last", algorithm__divergence__name="l2")
    before = flat(networks.theta.parameters())
    (report,) = networks.cluster.call_all("learner", LearnerRole.step, MIXED, FOUR)
    assert_close(before - flat(networks.theta.parameters()), expected)
    norms = torch.tensor(report.samples["grad_norm/reward/pickscore"])
    assert torch.equal(norms > 0, last)
    assert all(report.samples["reward/pickscore"])


def test_the_assistant_learns_from_the_same_law_of_samples(build: Callable[..., FewSteps]) -> None:
    networks = build()
    depths = networks.depths("assistant", 5)
    assert len(set(depths)) > 1
    loss = networks.assistant_loss(5)
    expected = gradient(loss, networks.psi)
    before = flat(networks.psi.parameters())
    (report,) = networks.cluster.call_all("assistant", AssistantRole.train, 5, FOUR)
    assert_close(before - flat(networks.psi.parameters()), expected)
    assert report.loss == pytest.approx(loss.item(), rel=1e-4)


def test_the_trained_step_is_uniform_and_a_function_of_the_samples_key() -> None:
    student = Student(SCHEDULE, STEPS)
    keys = [(3, "generator", step, i, "z", "depth") for step in range(50) for i in range(40)]
    depths = student.sample_depths(keys)
    counts = Counter(depths.tolist())
    assert set(counts) == {1, 2, 3, 4}
    assert stats.chisquare(list(counts.values())).pvalue > 0.01
    assert torch.equal(depths[:7], torch.cat([student.sample_depths([key]) for key in keys[:7]]))
    assert student.sample_depths(keys[6::-1]).tolist() == depths[:7].flip(0).tolist()
    assert student.times(depths, torch.device("cpu")).tolist()[:3] == [STEPS[k - 1] for k in depths.tolist()[:3]]
    assert set(Student(SCHEDULE, (399,)).sample_depths(keys).tolist()) == {1}


def test_a_batch_is_its_samples(tiny_sdxl: Path) -> None:
    """Depths may be mixed in a batch, and all of a batch's depths may be 1: every sample is what it is alone."""
    networks = store(tiny_sdxl, {"steps": 4})
    network = networks.generator_network().eval()
    noise = sequential(networks.latent_shape, [1, 2])
    noise(3)
    with torch.no_grad():
        for depths in ([1, 1], [4, 1], [2, 3]):
            together = networks.generate(network, PROMPTS, noise, torch.tensor(depths))
            for i, depth in enumerate(depths):
                one = lambda k, i=i: noise(k)[i : i + 1]  # noqa: E731
                alone = networks.generate(network, PROMPTS[i : i + 1], one, torch.tensor([depth]))
                torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
        whole = networks.generate(network, PROMPTS, noise)
        torch.testing.assert_close(
            whole, networks.generate(network, PROMPTS, noise, torch.tensor([4, 4])), rtol=0, atol=0
        )


def plain(model: Path, steps: int) -> Tensor:
    """What someone draws who knows diffusers only."""
    pipeline = DiffusionPipeline.from_pretrained(model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=0.0, output_type="pt", height=16, width=16,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
    ).images  # fmt: skip


def drawn(model: Path, student: dict[str, Any]) -> Tensor:
    networks = store(model, student)
    with torch.no_grad():
        noise = sequential(networks.latent_shape, [7, 8])
        return networks.decoder.decode(networks.generate(networks.generator_network().eval(), PROMPTS, noise))


def test_a_four_step_generator_of_dmd2_trains_samples_and_exports(
    make_recipe: MakeRecipe, tiny_sdxl: Path, tmp_path: Path
) -> None:
    generator = tiny.make_generator_bin(tiny_sdxl, tmp_path / "dmd2_sdxl_4step_unet_fp16.bin")
    recipe = make_recipe(models__generator=str(generator), student__steps=4, steps=2)
    out = run.run(recipe, tmp_path / "out").out
    student = json.loads((out / "model/student.json").read_text("utf-8"))
    assert student["timesteps"] == list(STEPS)
    expected = plain(out / "model", 4)
    assert expected.std() > 0.05, "a flat image compares nothing"
    torch.testing.assert_close(drawn(out / "model", {"steps": 4}), expected, rtol=0, atol=1e-5)
    for image, truth in zip(models.load(str(out)).sample(PROMPTS, seed=7), expected, strict=True):
        np.testing.assert_allclose(np.asarray(image) / 255, truth.permute(1, 2, 0), rtol=0, atol=0.51 / 255)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 2
    assert all(np.isfinite(row["assistant_loss"]) and row["grad_norm/divergence"] > 0 for row in rows)


@pytest.mark.parametrize("student", [{"steps": 1}, {"steps": 2, "transition": "deterministic"}])
def test_v_prediction_with_zero_terminal_snr_trains(
    make_recipe: MakeRecipe, tiny_sdxl: Path, tmp_path: Path, student: dict[str, Any]
) -> None:
    """The one timestep without signal is left out; D = a x - g v divides by nothing elsewhere."""
    reference = tmp_path / "v"
    shutil.copytree(tiny_sdxl, reference)
    file = reference / "scheduler/scheduler_config.json"
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")

    settings = {f"student__{key}": value for key, value in student.items()}
    chosen = {"models__reference": str(reference), "models__generator": str(reference)}
    recipe = make_recipe(**chosen, **settings, steps=2)
    cluster = LocalCluster(recipe)
    learner = cluster._worker.roles["learner"]
    assert (learner.schedule.last, learner.schedule.prediction_type) == (998, "v_prediction")
    assert learner._range == (20, 979)
    assert cluster._worker.roles["assistant"]._range == (0, 998)

    out = run.run(recipe, tmp_path / "out").out
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert all(np.isfinite(row["assistant_loss"]) and row["grad_norm/divergence"] > 0 for row in rows)
    expected = plain(out / "model", student["steps"])
    assert expected.std() > 0.05, "a flat image compares nothing"
    torch.testing.assert_close(drawn(out / "model", student), expected, rtol=0, atol=1e-5)

    for key, value in (("student__timesteps", "[999]"), ("algorithm__timesteps__assistant", "[0, 999]")):
        with pytest.raises(UsageError, match="998"):
            run.run(make_recipe(**chosen, **{key: value}), tmp_path / "refused")


def test_an_exported_generator_called_with_other_steps_is_said(tiny_sdxl: Path, tmp_path: Path) -> None:
    class Messages(TrainCallback):
        def __init__(self) -> None:
            self.said: list[str] = []

        def on_message(self, text: str) -> None:
            self.said.append(text)

    messages = Messages()
    settings: dict[str, Any] = {"reference": str(tiny_sdxl), "generator": str(tiny_sdxl), "height": 16, "width": 16}
    plain = ModelStore(Models(**settings), StudentSettings(steps=4), torch.device("cpu"))
    run._warn_of_other_steps(plain, messages)
    assert messages.said == []  # not an exported model
    folder = tmp_path / "model"
    write_model(plain, plain.generator_network().state_dict(), folder)
    again = Models(**{**settings, "generator": str(folder)})
    run._warn_of_other_steps(ModelStore(again, StudentSettings(steps=4), torch.device("cpu")), messages)
    assert messages.said == []
    run._warn_of_other_steps(ModelStore(again, StudentSettings(steps=1), torch.device("cpu")), messages)
    (said,) = messages.said
    assert "exported for timesteps [999.0, 749.0, 499.0, 249.0], this recipe calls it at [399.0]" in said
