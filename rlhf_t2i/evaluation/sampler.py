"""Images of a model, one-step or many-step: image i depends on the seed and i alone, not on its batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlhf_t2i.algorithm import rng
from rlhf_t2i.algorithm.student import keyed_noise
from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.evaluation.settings import Settings
from rlhf_t2i.families import sources
from rlhf_t2i.families.store import DTYPES, ModelStore
from rlhf_t2i.recipe.schema import Models, StudentSettings
from rlhf_t2i.utils import files

DEFAULT_STEPS = 50


@dataclass(frozen=True)
class Sampling:
    """How a model is sampled: resolved from the settings and what lies beside the model."""

    model: str
    base: str
    timestep: int | None
    """The one-step timestep; None samples many steps with the pipeline's own scheduler."""
    steps: int
    guidance: float
    resolution: int

    @property
    def words(self) -> str:
        """For a table's heading."""
        if self.timestep is not None:
            return f"1 step at t={self.timestep}, {self.resolution} px"
        return f"{self.steps} steps, guidance {self.guidance:g}, {self.resolution} px"


def resolve(settings: Settings) -> Sampling:
    """Decide how to sample ``settings.model``: a run folder, a pipeline folder, a hub id, or a UNet beside a base.

    Raises:
        UsageError: Not a model, or it lacks its base.
    """
    model = _run_folder(settings.model)
    base = settings.base or model
    source = sources.parse(base)
    index = sources.pipeline_index(source)
    hint = _one_step_hint(model)
    timestep = settings.timestep
    if timestep is None and settings.steps is None and settings.base is None and "timestep" in hint:
        timestep = int(hint["timestep"])
    if timestep is None and settings.base is not None:
        raise UsageError("--base is for a one-step UNet: give its --timestep (399 for DMD2 and DI*)")
    resolution = settings.resolution or int(hint.get("resolution", 0)) or _native_resolution(source, index)
    steps = 1 if timestep is not None else settings.steps or DEFAULT_STEPS
    return Sampling(model, base, timestep, steps, 0.0 if timestep is not None else settings.guidance, resolution)


class Sampler:
    """Draw images of a model.

    Args:
        sampling: From :func:`resolve`.
        seed: Of the evaluation.
        device: Where the networks live.
        precision: ``fp32`` or ``bf16``; the VAE always decodes in float32.
    """

    def __init__(self, sampling: Sampling, seed: int, device: torch.device, precision: str) -> None:
        self.sampling, self.seed, self.device = sampling, seed, device
        self.dtype = DTYPES[precision]
        models = Models(
            reference=sampling.base,
            generator=sampling.model,
            assistant=None,
            vae=None,
            height=sampling.resolution,
            width=sampling.resolution,
        )
        student = StudentSettings(timesteps=[sampling.timestep] if sampling.timestep is not None else None)
        self.store = ModelStore(models, student, device, precision)

    def keys(self, indices: Sequence[int]) -> list[rng.Key]:
        """The randomness of images ``indices``."""
        return [(self.seed, "evaluation", index) for index in indices]

    @torch.no_grad()
    def images(self, indices: Sequence[int], prompts: Sequence[str]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] on the CPU, one for each index and its prompt."""
        if self.sampling.timestep is not None:
            noise = keyed_noise(self.store.latent_shape, self.keys(indices), self.device)
            latents = self.store.generate(self._network, prompts, noise)
            return self.store.decoder.decode(latents).cpu()
        return self._pipeline_images(indices, prompts).float().clamp(0, 1).cpu()

    @cached_property
    def _network(self) -> Any:
        return self.store.generator_network().eval().requires_grad_(False)

    @cached_property
    def _pipeline(self) -> Any:
        from diffusers import DiffusionPipeline

        source = sources.parse(self.sampling.model)
        try:
            pipeline = DiffusionPipeline.from_pretrained(source.location, dtype=self.dtype, **source.kwargs)
        except Exception as error:
            raise UsageError(f"{self.sampling.model} cannot be loaded: {first_line(error)}") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device)

    def _pipeline_images(self, indices: Sequence[int], prompts: Sequence[str]) -> Tensor:
        # One generator an image: the starting noise and a stochastic scheduler's draws depend on that image alone.
        generators = [torch.Generator("cpu").manual_seed(rng.seed_of(*key)) for key in self.keys(indices)]
        call: Callable[..., Any] = self._pipeline
        arguments: dict[str, Any] = {
            "prompt": list(prompts), "num_inference_steps": self.sampling.steps,
            "guidance_scale": self.sampling.guidance, "generator": generators,
            "height": self.sampling.resolution, "width": self.sampling.resolution,
        }  # fmt: skip
        if type(self._pipeline).__name__ in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
            # Decoded here in float32: the SDXL VAE overflows half precision.
            return self.store.decoder.decode(call(**arguments, output_type="latent").images)
        return call(**arguments, output_type="pt").images


def _run_folder(model: str) -> str:
    """The exported pipeline of a run folder; anything else as it is."""
    exported = files.expanded(model) / "model"
    if (exported / "model_index.json").is_file():
        return str(exported)
    folder = files.expanded(model)
    if (folder / "recipe.yaml").is_file() and not (folder / "model_index.json").is_file():
        raise UsageError(f"{model} is a run without a model/ folder: it has not finished; resume it first")
    return model


def _one_step_hint(model: str) -> dict[str, Any]:
    try:
        data = json.loads((files.expanded(model) / "student.json").read_text("utf-8"))
        return {"timestep": data["timesteps"][0], "resolution": data["height"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _native_resolution(source: sources.ModelRef, index: dict[str, Any]) -> int:
    """Pixels of the model's own size: the UNet's sample size times the VAE's factor."""
    part = "unet" if "unet" in index else "transformer"
    size = int(sources.read_json(source, f"{part}/config.json").get("sample_size") or 128)
    levels = sources.read_json(source, "vae/config.json").get("block_out_channels", [0] * 4)
    return size * 2 ** (len(levels) - 1)
