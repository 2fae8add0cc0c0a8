"""Models that draw images: a student through this package's own code, a many-step reference through diffusers.

Image i depends on its own noise alone, not on its batch. An evaluation draws noise by sample key
(:mod:`rlhf_t2i.algorithm.rng`); :meth:`StudentModel.sample` draws it as a diffusers pipeline does, so that a plain
``pipe(prompt, num_inference_steps=K, guidance_scale=0, generator=...)`` gives the same picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from rlhf_t2i.algorithm import rng
from rlhf_t2i.algorithm.prompts import check_text
from rlhf_t2i.algorithm.student import Noise, keyed_noise
from rlhf_t2i.errors import RunError, UsageError, first_line, option
from rlhf_t2i.evaluation.settings import Drawing
from rlhf_t2i.families import sources
from rlhf_t2i.families.export import STUDENT, StudentFile
from rlhf_t2i.families.sources import ModelRef
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe.schema import Models, StudentSettings
from rlhf_t2i.utils import files, images
from rlhf_t2i.utils.device import default_device
from rlhf_t2i.utils.quiet import quietly

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DEFAULT_STEPS = 50
MAX_SEED = 2**62


class ImageModel(ABC):
    """A model in this process that draws images.

    Args:
        store: Its networks; read when it draws first.
    """

    def __init__(self, store: ModelStore) -> None:
        self.store = store

    @property
    @abstractmethod
    def description(self) -> str:
        """How it draws, for a table's heading."""

    @abstractmethod
    def images(self, prompts: Sequence[str], keys: Sequence[rng.Key]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] on the CPU; image i is a function of its prompt and ``keys[i]`` alone."""

    @abstractmethod
    def image(self, prompt: str, generator: torch.Generator) -> Tensor:
        """One image [1, 3, H, W] in [0, 1], all of whose noise comes from a generator, as in a pipeline call."""

    @quietly()
    def sample(self, prompts: str | Sequence[str], seed: int = 0) -> list[Image.Image]:
        """One image per prompt; image i uses the noise of ``seed + i``.

        Args:
            prompts: A list of prompts, or one.
            seed: From 0 to 2^62.

        Raises:
            UsageError: No such seed, or prompts that are no strings or that no tokenizer reads.
            RunError: An image is not finite.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, Sequence) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UsageError("prompts are a string, or a list of strings")
        for number, prompt in enumerate(prompts, 1):
            check_text(prompt, f"prompt {number}")
        if not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise UsageError(f"no such seed: {seed}; seeds are whole numbers from 0 to 2^62")
        # One at a time, as the pipeline call that it must equal: a batch may round differently in the last bit.
        seeds = range(seed, seed + len(prompts))
        drawn = [self.image(p, torch.Generator().manual_seed(s)) for p, s in zip(prompts, seeds, strict=True)]
        return [images.to_pil(image[0]) for image in drawn]

    def _size(self) -> str:
        height, width = self.store.size
        return f"{width} x {height} px"


def resolved(drawing: Drawing) -> Drawing:
    """The same with everything decided, from the files beside the model.

    Raises:
        UsageError: Not a model, or a network without its steps.
    """
    model = _exported(drawing.model)
    source = sources.parse(drawing.base or model)
    sources.pipeline_index(source)
    alone, student = drawing.base not in (None, model), drawing.student
    if alone and student is None and drawing.steps is None:
        raise UsageError(
            f"{option('base')} is for a network alone: give a generator's {option('timesteps')} (399 for DMD2 "
            f"and DI*), or the {option('steps')} of a "
            "many-step model"
        )
    found = {"model": model, "base": drawing.base or model, "steps": drawing.steps or DEFAULT_STEPS}
    own = None if alone else _student_file(source)
    if own is not None:
        if student is None and drawing.steps is None:
            steps = {"timesteps": own.timesteps, "transition": own.transition, "input": own.input}
            student = StudentSettings.model_validate(steps)
        found |= {"student": student, "height": drawing.height or own.height, "width": drawing.width or own.width}
    return drawing.model_copy(update=found)


@quietly()
def load(model: str | Drawing, device: torch.device | None = None, precision: str = "fp32") -> ImageModel:
    """Load a model to draw with, e.g. ``load("runs/quickstart").sample(["a red cat"], seed=0)``.

    Its networks are read when it draws first.

    Args:
        model: A run's folder, a diffusers folder or a hub id; or how one is drawn.
        device: Where it draws; the GPU if there is one.
        precision: ``fp32`` or ``bf16``.

    Raises:
        UsageError: The model is missing, damaged or of an unknown family.
    """
    chosen = resolved(Drawing(model=model) if isinstance(model, str) else model)
    base, student = chosen.base or chosen.model, chosen.student
    models = Models(reference=base, generator=chosen.model, vae=chosen.vae, height=chosen.height, width=chosen.width)
    store = ModelStore(models, student or StudentSettings(), device or default_device(), precision)
    store.verify()
    store.family.check()
    store.family.check_decoder(store.vae)
    _ = store.latent_shape
    if chosen.model != base:
        # A many-step model is drawn by the base's own pipeline.
        family = store.family if student is None else store.generator_family
        family.check_structure(sources.parse(chosen.model), "the model")
    if student is None:
        return PipelineModel(store, chosen.steps or DEFAULT_STEPS, chosen.guidance)
    _ = store.student
    return StudentModel(store)


class StudentModel(ImageModel):
    """A one- or few-step generator."""

    @property
    def description(self) -> str:
        """See :class:`ImageModel`."""
        student = self.store.student
        steps = ", ".join(f"{tau:g}" for tau in student.timesteps)
        return f"{_count(student.steps, 'step')} at t = {steps}, {self._size()}"

    def images(self, prompts: Sequence[str], keys: Sequence[rng.Key]) -> Tensor:
        """See :class:`ImageModel`."""
        return self._draw(prompts, keyed_noise(self.store.latent_shape, keys, self.store.device))

    def image(self, prompt: str, generator: torch.Generator) -> Tensor:
        """See :class:`ImageModel`."""
        return self._draw([prompt], self.store.sequential_noise([generator]))

    @torch.no_grad()
    def _draw(self, prompts: Sequence[str], noise: Noise) -> Tensor:
        return _finite(self.store.decoder.decode(self.store.generate(self._network, prompts, noise)))

    @cached_property
    def _network(self) -> torch.nn.Module:
        return self.store.generator_network().eval().requires_grad_(False)


class PipelineModel(ImageModel):
    """A many-step model, drawn by its own diffusers pipeline.

    Args:
        store: Its decoder and size; its generator is the network, where the reference's does not draw itself.
        steps: Sampling steps.
        guidance: Guidance scale.
    """

    def __init__(self, store: ModelStore, steps: int, guidance: float) -> None:
        super().__init__(store)
        self._steps, self._guidance = steps, guidance
        self._plain_latents = True  # until the pipeline returns packed ones

    @property
    def description(self) -> str:
        """See :class:`ImageModel`."""
        return f"{_count(self._steps, 'step')}, guidance {self._guidance:g}, {self._size()}"

    def images(self, prompts: Sequence[str], keys: Sequence[rng.Key]) -> Tensor:
        """See :class:`ImageModel`."""
        # One generator per image: its starting noise and a stochastic scheduler's draws depend on that image alone.
        return self._draw(prompts, [torch.Generator().manual_seed(rng.seed_of(*key)) for key in keys])

    def image(self, prompt: str, generator: torch.Generator) -> Tensor:
        """See :class:`ImageModel`."""
        return self._draw([prompt], [generator])

    def _draw(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> Tensor:
        try:
            return self._draw_with_pipeline(prompts, generators)
        except ValueError as error:  # its scheduler has no such number of steps
            raise UsageError(
                f"{self.store.models.reference}: its pipeline does not draw in {self._steps} steps "
                f"({first_line(error)}): give another number of steps; of a few-step generator put its {STUDENT} "
                "beside model_index.json"
            ) from error

    def _draw_with_pipeline(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> Tensor:
        height, width = self.store.size
        call = partial(
            self._pipeline, prompt=list(prompts), num_inference_steps=self._steps, height=height, width=width,
            **self.store.family.sampling_call(self._steps, self._guidance, len(prompts)),
        )  # fmt: skip
        if self._plain_latents:
            fresh = [generator.clone_state() for generator in generators]
            latents = call(generator=fresh, output_type="latent").images
            self._plain_latents = tuple(latents.shape[1:]) == self.store.latent_shape
            if self._plain_latents:  # decoded here in float32: SDXL's VAE overflows half precision
                return _finite(self.store.decoder.decode(latents))
        return _finite(call(generator=list(generators), output_type="pt").images)

    @cached_property
    def _pipeline(self) -> DiffusionPipeline:
        store, models = self.store, self.store.models
        pipeline = store.family.load_pipeline(store.family.reference, store.dtype)
        if models.generator != models.reference:
            network = store.family.load_network(sources.parse(models.generator)).to(store.dtype)
            pipeline.register_modules(**{store.family.network_part: network})
        return pipeline.to(store.device)


def _student_file(source: ModelRef) -> StudentFile | None:
    """The steps that an exported model names, locally or on the hub."""
    if source.is_local:
        return StudentFile.read(Path(source.location))
    try:
        return StudentFile.read(Path(sources.hub_file(source, STUDENT)).parent)
    except UsageError:  # absent, or out of reach: then loading fails with its own message
        return None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _finite(drawn: Tensor) -> Tensor:
    drawn = drawn.float().cpu()
    if not bool(drawn.isfinite().all()):
        raise RunError("the model drew an image that is not finite: its weights or precision are at fault")
    return drawn.clamp(0, 1)


def _exported(model: str) -> str:
    """The exported pipeline of a run's folder; anything else unchanged."""
    folder = files.expanded(model)
    if (folder / "model" / "model_index.json").is_file():
        return str(folder / "model")
    if (folder / "recipe.yaml").is_file() and not (folder / "model_index.json").is_file():
        raise UsageError(f"{model} is a run without a model/ folder: it has not finished; resume it first")
    return model
