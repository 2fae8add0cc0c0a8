"""One-step sampling equals diffusers' own, from the scheduler's formula to the finished picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, EulerDiscreteScheduler, LCMScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from rlhf_t2i.algorithm.schedules import NoiseSchedule
from rlhf_t2i.evaluation.sampling import sample
from rlhf_t2i.families.conditioning import Conditioning
from rlhf_t2i.families.loading import ModelStore
from rlhf_t2i.families.networks import one_step, predict
from rlhf_t2i.recipe.schema import Models
from tests import tiny

CPU = torch.device("cpu")
PROMPTS = ["a red cat, smiling", "a gold whale"]


def store(folder: Path, **changes: Any) -> ModelStore:
    settings = {"reference": str(folder), "generator": str(folder), "resolution": tiny.RESOLUTION, **changes}
    return ModelStore(Models(**settings), CPU)


class Constant(torch.nn.Module):
    """A network whose output is given."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = torch.nn.Parameter(output)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        return (self.output,)


@pytest.mark.parametrize("timestep", [399, 249, 749])
def test_one_step_is_the_lcm_scheduler(timestep: int) -> None:
    euler = EulerDiscreteScheduler(**tiny.SCHEDULE, timestep_spacing="leading", steps_offset=1)
    lcm = LCMScheduler.from_config(euler.config)
    lcm.set_timesteps(timesteps=[timestep])
    generator = torch.Generator().manual_seed(0)
    z, output = (torch.randn(2, 4, 128, 128, generator=generator) for _ in range(2))
    theirs = lcm.step(output, lcm.timesteps[0], lcm.scale_model_input(z, timestep)).prev_sample
    ours = one_step(
        Constant(output),
        z * lcm.init_noise_sigma,
        Conditioning(torch.zeros(2, 1, 1)),
        timestep,
        NoiseSchedule.from_scheduler(euler),
        torch.float32,
    )
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-6, atol=1e-6)


def test_the_whole_pipeline_gives_the_same_picture(tiny_sdxl: Path) -> None:
    """StableDiffusionXLPipeline + LCMScheduler, one step at 399, guidance 0, as a user of OUT/model would run it."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, local_files_only=True, add_watermarker=False)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    z = torch.randn(2, *tiny.LATENTS, generator=torch.Generator().manual_seed(1))
    size = {"height": tiny.RESOLUTION, "width": tiny.RESOLUTION}
    theirs = pipeline(
        PROMPTS, num_inference_steps=1, timesteps=[399], guidance_scale=0.0, latents=z, output_type="pt", **size
    ).images

    models = store(tiny_sdxl)
    with torch.no_grad():
        cond = models.conditioner.encode(PROMPTS)
        x0 = one_step(models.generator_unet().eval(), z, cond, 399, models.schedule, torch.float32)
        ours = models.decoder.decode(x0)
    assert ours.shape == (2, 3, tiny.RESOLUTION, tiny.RESOLUTION)
    assert ours.std() > 0.05, "a flat picture compares nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_a_pipeline_of_several_dtypes_is_sampled(
    tiny_sdxl: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A float32 run's export beside its reference's float16 encoders and VAE, as emoji64's and SDXL's often are."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_sdxl, folder)
    for file in (*folder.glob("text_encoder*/*.safetensors"), *folder.glob("vae/*.safetensors")):
        save_file({k: v.half() for k, v in load_file(file).items()}, file, {"format": "pt"})
    for file in folder.glob("text_encoder*/config.json"):
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"dtype": "float16"}), "utf-8")
    images = sample(str(folder), PROMPTS)
    said = capfd.readouterr()
    assert said.out + said.err == "", "the libraries' bars and advice are no business of who draws a picture"
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, sample(str(tiny_sdxl), PROMPTS), rtol=0, atol=0.05)


def test_the_generator_is_differentiable_and_float32(tiny_sdxl: Path) -> None:
    models = store(tiny_sdxl)
    unet = models.generator_unet()
    z = torch.randn(1, *tiny.LATENTS)
    x0 = one_step(unet, z, models.conditioner.encode(PROMPTS[:1]), 399, models.schedule, torch.bfloat16)
    assert x0.dtype == torch.float32
    x0.square().mean().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in unet.parameters())


def test_bf16_autocast_stays_near_float32(tiny_sdxl: Path) -> None:
    models = store(tiny_sdxl)
    unet, cond = models.generator_unet().eval(), models.conditioner.encode(PROMPTS)
    z, t = torch.randn(2, *tiny.LATENTS), torch.tensor([399, 20])
    with torch.no_grad():
        full, half = (predict(unet, z, t, cond, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    assert (full - half).norm() < 0.03 * full.norm()


def test_guidance_branches_batched_equal_separate_calls(tiny_sdxl: Path) -> None:
    models = store(tiny_sdxl)
    unet = models.reference_unet()
    x, t = torch.randn(2, *tiny.LATENTS), torch.tensor([20, 979])
    cond, uncond = models.conditioner.encode(PROMPTS), models.conditioner.unconditional(2)
    both = predict(unet, torch.cat([x, x]), torch.cat([t, t]), uncond.concatenate(cond), torch.float32)
    torch.testing.assert_close(both[:2], predict(unet, x, t, uncond, torch.float32), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[2:], predict(unet, x, t, cond, torch.float32), rtol=1e-4, atol=1e-5)
    assert (both[:2] - both[2:]).abs().max() > 1e-3


def test_decoder_scales_clamps_and_passes_gradients(tiny_sdxl: Path) -> None:
    decoder = store(tiny_sdxl).decoder
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
    assert models.latent_shape == tiny.LATENTS
    assert models.decoder.scaling_factor == 1.0
    assert models.decoder.decode(torch.randn(1, *tiny.LATENTS)).shape == (1, 3, 16, 16)
