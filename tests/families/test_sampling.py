"""Drawing with a student equals diffusers' own pipelines, from the scheduler's formula to the finished image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from rlhf_t2i.algorithm.schedules import VPSchedule
from rlhf_t2i.algorithm.student import Noise, Student
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import registry, sources
from rlhf_t2i.families.base import Conditioning
from rlhf_t2i.families.export import write_model
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe.schema import Models, StudentSettings
from tests import tiny

CPU = torch.device("cpu")
PROMPTS = ["a red cat, smiling", "a gold whale"]


def store(folder: Path, student: dict[str, Any] | None = None, precision: str = "fp32", **changes: Any) -> ModelStore:
    settings = {"reference": str(folder), "generator": str(folder), "height": tiny.RESOLUTION, "width": tiny.RESOLUTION}
    return ModelStore(Models(**{**settings, **changes}), StudentSettings(**(student or {})), CPU, precision)


def sequential(shape: tuple[int, ...], seeds: list[int]) -> Noise:
    """The noises that a pipeline draws from one generator per image."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn: list[Tensor] = []

    def noise(k: int) -> Tensor:
        while len(drawn) <= k:
            drawn.append(torch.stack([torch.randn(shape, generator=generator) for generator in generators]))
        return drawn[k]

    return noise


@pytest.mark.parametrize("timestep", [399, 249, 749])
def test_one_step_is_the_lcm_scheduler(timestep: int) -> None:
    euler = EulerDiscreteScheduler(**tiny.SCHEDULE, timestep_spacing="leading", steps_offset=1)
    lcm = LCMScheduler.from_config(euler.config)
    lcm.set_timesteps(timesteps=[timestep])
    generator = torch.Generator().manual_seed(0)
    z, output = (torch.randn(2, 4, 128, 128, generator=generator) for _ in range(2))
    theirs = lcm.step(output, lcm.timesteps[0], lcm.scale_model_input(z, timestep)).prev_sample
    schedule = VPSchedule.from_config(euler.config)
    student = Student(schedule, (timestep,))
    ours = student.sample(lambda x, t, samples: schedule.to_x0(output, x, t), lambda k: z * lcm.init_noise_sigma)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


STUDENTS: dict[str, dict[str, Any]] = {
    "one step at 399": {},
    "one step at 999": {"timesteps": [999]},
    "one step at 1": {"timesteps": [1]},
    "four steps (DMD2)": {"steps": 4},
    "four steps from 799": {"timesteps": [799, 599, 399, 199]},
    "four deterministic steps": {"steps": 4, "transition": "deterministic"},
    "scaled noise at 625 (SiD-LSG)": {"timesteps": [625], "input": "sigma"},
    "two deterministic steps from scaled noise": {
        "timesteps": [999, 499],
        "input": "sigma",
        "transition": "deterministic",
    },
}


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("make", ["sdxl", "sd15"])
def test_a_plain_pipeline_call_draws_the_exported_students_images(
    name: str, make: str, tiny_sdxl: Path, tiny_sd15: Path, tmp_path: Path
) -> None:
    """``pipe(prompt, num_inference_steps=K, guidance_scale=0)`` on OUT/model, as the README shows it."""
    models = store(tiny_sdxl if make == "sdxl" else tiny_sd15, STUDENTS[name])
    network = models.generator_network().eval()
    write_model(models, network.state_dict(), tmp_path / "model")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": tiny.RESOLUTION, "width": tiny.RESOLUTION}
    seeds, steps = [7, 8], models.student.steps
    theirs = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=0.0, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], **size,
    ).images  # fmt: skip
    with torch.no_grad():
        latents = models.generate(network, PROMPTS, sequential(models.latent_shape, seeds))
        ours = models.decoder.decode(latents)
    assert ours.std() > 0.05, "a flat image compares nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    # What was exported is a reference of the same schedule, though its scheduler is cut off.
    again = store(tmp_path / "model", STUDENTS[name])
    again.check()
    torch.testing.assert_close(again.schedule.alphas_cumprod, models.schedule.alphas_cumprod)


@pytest.mark.parametrize("transition", ["stochastic", "deterministic"])
def test_an_exported_flow_model_is_a_reference_with_its_own_shift(
    transition: str, tiny_sd3: Path, tmp_path: Path
) -> None:
    models = store(tiny_sd3, {"steps": 4, "transition": transition})
    write_model(models, models.generator_network().state_dict(), tmp_path / "model")
    assert models.schedule.default_law().shift == 3.0
    assert store(tmp_path / "model").schedule.default_law() == models.schedule.default_law()


@pytest.mark.parametrize("steps", [2, 3, 7, 8, 64])
@pytest.mark.parametrize("transition", ["stochastic", "deterministic"])
def test_the_default_steps_are_those_of_the_exported_scheduler(steps: int, transition: str, tiny_sdxl: Path) -> None:
    """Also for K that does not divide 1000, and where the last timestep is excluded (zero terminal SNR)."""
    models = store(tiny_sdxl, {"steps": steps, "transition": transition})
    for zero_snr in (False, True):
        family = registry.find(sources.parse(str(tiny_sdxl)))
        family.scheduler_config["rescale_betas_zero_snr"] = zero_snr
        student = Student(family.schedule(0, 0), family.default_timesteps(steps), models.student.transition)
        exported = family.export_scheduler(student)
        exported.scheduler.set_timesteps(steps)
        assert exported.scheduler.timesteps.tolist() == list(student.timesteps)
        assert exported.arguments == {}


def test_the_end_of_the_path_is_refused(tiny_sdxl: Path) -> None:
    """The exported pipeline would give the noise back."""
    for timesteps in ([0], [500, 0]):
        models = store(tiny_sdxl, {"timesteps": timesteps})
        with pytest.raises(UsageError, match=r"student\.timesteps: 0 is the end of the path"):
            models.check()


def test_irregular_steps_need_timesteps(tiny_sdxl: Path) -> None:
    models = store(tiny_sdxl, {"timesteps": [900, 500, 250]})
    assert models.family.export_scheduler(models.student).arguments == {"timesteps": [900, 500, 250]}
    for settings in ({"transition": "deterministic"}, {"transition": "deterministic", "input": "sigma"}):
        with pytest.raises(UsageError, match="not evenly spaced"):
            store(tiny_sdxl, {"timesteps": [900, 500, 250], **settings}).check()
    with pytest.raises(UsageError, match="transition: deterministic"):
        store(tiny_sdxl, {"steps": 2, "input": "sigma"}).check()


@pytest.mark.parametrize("settings", [{}, {"steps": 4}])
def test_the_generator_is_differentiable_and_float32(tiny_sdxl: Path, settings: dict[str, Any]) -> None:
    models = store(tiny_sdxl, settings, precision="bf16")
    network = models.generator_network()
    noise = sequential(models.latent_shape, [1, 2])
    depths = torch.tensor([1, models.student.steps])
    x0 = models.generate(network, PROMPTS, noise, depths)
    assert x0.dtype == torch.float32
    x0.square().mean().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in network.parameters())


def test_bf16_autocast_stays_near_float32(tiny_sdxl: Path) -> None:
    full, half = store(tiny_sdxl), store(tiny_sdxl, precision="bf16")
    network, cond = full.generator_network().eval(), full.conditioner.encode(PROMPTS)
    z, t = torch.randn(2, *tiny.LATENTS), torch.tensor([399, 20])
    with torch.no_grad():
        one, other = full.predict(network, z, t, cond), half.predict(network, z, t, cond)
    assert other.dtype == torch.float32
    assert not torch.equal(one, other)
    assert (one - other).norm() < 0.03 * one.norm()


def test_guidance_branches_batched_equal_separate_calls(tiny_sdxl: Path) -> None:
    models = store(tiny_sdxl)
    network = models.reference_network()
    x, t = torch.randn(2, *tiny.LATENTS), torch.tensor([20, 979])
    cond, uncond = models.conditioner.encode(PROMPTS), models.conditioner.unconditional(2)
    both = models.predict(network, torch.cat([x, x]), torch.cat([t, t]), Conditioning.cat([uncond, cond]))
    torch.testing.assert_close(both[:2], models.predict(network, x, t, uncond), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[2:], models.predict(network, x, t, cond), rtol=1e-4, atol=1e-5)
    assert (both[:2] - both[2:]).abs().max() > 1e-3


def test_decoder_scales_clamps_and_passes_gradients(tiny_sdxl: Path) -> None:
    decoder: Any = store(tiny_sdxl).decoder
    assert decoder.scaling_factor == 0.13025
    latents = torch.randn(1, *tiny.LATENTS, requires_grad=True)
    images = decoder.decode(latents)
    raw = decoder.vae.decode(latents / 0.13025, return_dict=False)[0] / 2 + 0.5
    torch.testing.assert_close(images, raw.clamp(0, 1))
    assert images.min() >= 0
    assert images.max() <= 1
    images.sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().max() > 0
    assert all(p.grad is None for p in decoder.parameters())


def test_another_vae_may_decode(tiny_sdxl: Path, tmp_path: Path) -> None:
    """A tiny autoencoder in place of the pipeline's VAE: its own scaling factor and its own size."""
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path)
    models = store(tiny_sdxl, vae=str(tmp_path))
    decoder: Any = models.decoder
    assert models.latent_shape == tiny.LATENTS
    assert decoder.scaling_factor == 1.0
    assert decoder.decode(torch.randn(1, *tiny.LATENTS)).shape == (1, 3, 16, 16)
