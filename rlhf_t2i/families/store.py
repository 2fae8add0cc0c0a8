"""The networks of a run, each loaded once per process and shared by the roles in it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Literal, cast

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm.schedules import Schedule, VPSchedule
from rlhf_t2i.algorithm.student import Noise, Student, sequential_noise
from rlhf_t2i.algorithm.timesteps import TimestepLaw, probability
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import embeddings, registry, sources
from rlhf_t2i.families.base import Conditioner, Conditioning, Decoder, Family, NetworkCall
from rlhf_t2i.families.compiling import compile_blocks
from rlhf_t2i.families.embeddings import EmbeddingFolder, Entry, Progress, StoredConditioner
from rlhf_t2i.families.frozen import freeze_convs, halve_attention, twin
from rlhf_t2i.families.sources import ModelRef
from rlhf_t2i.recipe.schema import Models, StudentSettings, Timesteps
from rlhf_t2i.utils import files
from rlhf_t2i.utils.device import send
from rlhf_t2i.utils.versions import installed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_DECODER_DTYPES = DTYPES | {"mixed": torch.float32}
_RARE = 1e-6
"""Probability of a role's range of timesteps, below which a law is taken for a mistake."""


def set_precision(decoder: Decoder, precision: str, device: torch.device) -> Decoder:
    """A decoder in ``models.vae_precision`` for a device; in place. The meta device stands for a GPU.

    ``mixed`` is float32 with attention in bf16 where there are tensor cores; on a CPU it is ``fp32``. On CUDA torch
    computes float32 convolutions in TF32 by default. SDXL's decoder overflows float16.
    """
    if precision == "mixed" and device.type != "cpu":
        halve_attention(decoder, decoder.attention_names)
    nn.Module.to(decoder, _DECODER_DTYPES[precision])  # diffusers' own warns
    return decoder


class ModelStore:
    """The networks that a recipe names, loaded on first use.

    Args:
        models: The recipe's ``models`` section.
        student: Its ``student`` section.
        device: Where the networks live.
        precision: ``fp32`` or ``bf16``: the dtype of frozen networks and of computation. Trained weights are float32.
        compiled: Whether networks and decoder are compiled when they first run.
    """

    def __init__(
        self,
        models: Models,
        student: StudentSettings,
        device: torch.device,
        precision: str = "fp32",
        *,
        compiled: bool = False,
    ) -> None:
        self.models, self.device, self.dtype = models, device, DTYPES[precision]
        self._student, self._compiled = student, compiled
        self._bases: dict[tuple[ModelRef, torch.dtype], nn.Module] = {}

    def check(self) -> None:
        """Read every configuration, but no weights: refuse what is missing or foreign before anything starts.

        Raises:
            UsageError: One sentence naming the folder or file.
        """
        vae = self.vae
        self.verify()
        self.family.check()
        self.generator_family.check()
        self.family.check_decoder(vae)
        _ = self.latent_shape, self.schedule
        self.generator_family.check_structure(sources.parse(self.models.generator), "models.generator")
        if self.models.assistant is not None:
            self.family.check_structure(sources.parse(self.models.assistant), "models.assistant")
        self.generator_family.check_export(self.student, vae)
        if self.models.embeddings is not None:
            embeddings.check(files.expanded(self.models.embeddings))
        if self.models.vae_slicing or self.models.vae_tiling:
            self.family.build_decoder(vae).limit_memory(self.models.vae_slicing, self.models.vae_tiling)

    def verify(self) -> None:
        """Compare models that this package exported with their manifests.

        Raises:
            UsageError: A file is missing or has changed.
        """
        models = self.models
        for text in dict.fromkeys((models.reference, models.generator, models.assistant, models.vae)):
            if text is not None:
                sources.verify(sources.parse(text))

    @cached_property
    def family(self) -> Family:
        """The family of the reference."""
        return registry.find(sources.parse(self.models.reference))

    @cached_property
    def generator_family(self) -> Family:
        """The family of the generator: the reference's, or one beside it whose network has inputs of its own."""
        return self.family.for_generator(sources.parse(self.models.generator))

    @cached_property
    def vae(self) -> sources.ModelRef | None:
        """The decoder that takes the reference's place, if the recipe names one."""
        return None if self.models.vae is None else sources.parse(self.models.vae)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        height, width = self.family.native_size()
        return self.models.height or height, self.models.width or width

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one sample's latents."""
        return self.family.latent_shape(*self.size)

    @cached_property
    def schedule(self) -> Schedule:
        """The noise schedule of the reference."""
        return self.family.schedule(*self.size)

    @cached_property
    def student(self) -> Student:
        """How the generator is called.

        Raises:
            UsageError: A timestep at which the network's prediction gives no image.
        """
        family, settings = self.generator_family, self._student
        schedule = self.schedule if family is self.family else family.schedule(*self.size)
        taus = settings.timesteps or family.default_timesteps(settings.steps)
        outside = next((tau for tau in taus if not schedule.first <= tau <= schedule.last), None)
        if outside is not None:
            raise UsageError(
                f"student.timesteps: {outside:g} is outside the reference's {schedule.first:g} to {schedule.last:g}"
            )
        _check_whole("student.timesteps", taus, schedule)
        return Student(schedule, tuple(taus), settings.transition, settings.input)

    def timestep_range(self, timesteps: Timesteps, role: Literal["generator", "assistant"]) -> tuple[float, float]:
        """(first, last) of a role's training timesteps: the recipe's, or the schedule's own.

        Raises:
            UsageError: A timestep outside the schedule, or between two of its steps.
        """
        chosen = getattr(timesteps, role)
        if chosen is None:
            return self.schedule.training_range(role)
        first, last = chosen
        if first < self.schedule.first or last > self.schedule.last:
            raise UsageError(
                f"algorithm.timesteps.{role}: [{first:g}, {last:g}] is not within the reference's "
                f"{self.schedule.first:g} to {self.schedule.last:g}"
            )
        _check_whole(f"algorithm.timesteps.{role}", chosen, self.schedule)
        return first, last

    def timestep_law(self, timesteps: Timesteps) -> TimestepLaw | None:
        """The distribution of training timesteps; None for the schedule's own.

        Raises:
            UsageError: It is not determined, or draws nothing from a role's range.
        """
        if timesteps.law is None:
            return None
        own = self.schedule.default_law()
        if timesteps.law == "shifted" and timesteps.shift is None and own.kind != "shifted":
            raise UsageError(
                "algorithm.timesteps.shift: the reference has no shift of its own, so that law: shifted needs one "
                "(3 puts more weight on noise, 1 is law: uniform)"
            )
        law = TimestepLaw(timesteps.law, timesteps.shift or own.shift, timesteps.mean, timesteps.std)
        roles: tuple[Literal["generator", "assistant"], ...] = ("generator", "assistant")
        for role in roles:
            first, last = self.timestep_range(timesteps, role)
            if first < last and probability(law, first / 1000, last / 1000) < _RARE:
                raise UsageError(
                    f"algorithm.timesteps: {law.kind} with mean {law.mean:g} and std {law.std:g} draws none of the "
                    f"{role}'s timesteps {first:g} to {last:g}: half of its levels t / 1000 are below "
                    f"{float(law.inverse_cdf(torch.tensor(0.5))):.3g}"
                )
        return law

    @cached_property
    def embeddings(self) -> EmbeddingFolder | None:
        """Where the recipe keeps prompt embeddings, if it does."""
        if self.models.embeddings is None:
            return None
        versions = installed(("torch", "transformers", "diffusers"))
        settings = (self.family.name, self.family.encoders_identity(), str(self.dtype), self.size, versions)
        return EmbeddingFolder(files.expanded(self.models.embeddings), repr(settings))

    @cached_property
    def text_encoders(self) -> Conditioner:
        """The frozen text encoders of the reference."""
        return self.family.load_conditioner(self.dtype, *self.size).to(self.device)

    def encode_missing(self, entries: list[Entry], progress: Progress) -> None:
        """Encode prompts into :attr:`embeddings`, and free the text encoders.

        Args:
            entries: Of :meth:`EmbeddingFolder.missing`.
            progress: Called before the encoders are loaded, and after each prompt.
        """
        assert self.embeddings is not None
        self.embeddings.prepare()
        progress(0, len(entries))
        try:
            embeddings.encode(self.embeddings, entries, self.text_encoders, progress)
        finally:
            self.__dict__.pop("text_encoders", None)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @cached_property
    def conditioner(self) -> Conditioner:
        """What makes conditioning of prompts: the text encoders, or the embeddings that they left."""
        return StoredConditioner(self.embeddings, self.device) if self.embeddings else self.text_encoders

    @cached_property
    def decoder(self) -> Decoder:
        """The frozen decoder, see :func:`set_precision`."""
        decoder = self.family.load_decoder(self.vae)
        decoder.limit_memory(self.models.vae_slicing, self.models.vae_tiling)
        if self._compiled:
            compile_blocks(decoder, decoder.block_names)
        decoder = set_precision(decoder, self.models.vae_precision, self.device)
        return decoder.to(self.device, memory_format=torch.channels_last)

    def reference_network(self) -> nn.Module:
        """The reference's frozen network in the compute dtype, on weights that trained ones left as they are.

        A process builds it last: afterwards it keeps convolutions in an order of its own, and no base for others.
        """
        network = self._network(self.family, self.family.reference, self.dtype, shared=True)
        self._bases.clear()
        return freeze_convs(network.to(dtype=self.dtype, memory_format=torch.channels_last))

    def assistant_network(self, base: torch.dtype | None = None) -> nn.Module:
        """The assistant's network, from the reference unless the recipe says; see :meth:`generator_network`."""
        text = self.models.assistant
        source = self.family.reference if text is None else sources.parse(text)
        return self._network(self.family, source, base or torch.float32, shared=base is not None)

    def generator_network(self, base: torch.dtype | None = None) -> nn.Module:
        """The generator's network, to be trained or sampled.

        Args:
            base: The dtype of weights that adapters will leave as they are, and that may be another role's, too; None
                for float32 weights of its own.
        """
        source = sources.parse(self.models.generator)
        return self._network(self.generator_family, source, base or torch.float32, shared=base is not None)

    def _network(self, family: Family, source: ModelRef, dtype: torch.dtype, shared: bool) -> nn.Module:
        if shared:
            key = family.network_place(source), dtype
            if key not in self._bases:
                self._bases[key] = self._load(family, source, dtype).requires_grad_(False)
            network = twin(self._bases[key])
        else:
            network = self._load(family, source, dtype)
        if self._compiled:
            compile_blocks(network, family.block_names)
        return network

    def _load(self, family: Family, source: ModelRef, dtype: torch.dtype) -> nn.Module:
        def placed(tensor: Tensor) -> Tensor:
            moved = tensor.to(self.device)
            if not moved.is_floating_point():
                return moved
            # Buffers stay float32, as DeepSpeed leaves them.
            return moved.float().to(dtype) if isinstance(tensor, nn.Parameter) else moved.float()

        # One tensor at a time, converted on the device: host memory is freed as the device fills, and never holds the
        # network in two types. By nn.Module's own method: diffusers' warns.
        return nn.Module._apply(family.load_network(source), placed)

    def sequential_noise(self, generators: Sequence[torch.Generator]) -> Noise:
        """The noises that the exported pipeline draws from one ``torch.Generator`` per image."""
        shape = tuple(self.latent_shape)
        packed = self.family.to_scheduler(torch.empty(1, *shape)).shape[1:]
        noise = sequential_noise([shape, packed], generators, self.device)
        return lambda k: noise(k) if k == 0 else self.family.from_scheduler(noise(k), *self.size)

    def generate(
        self, network: NetworkCall, prompts: Sequence[str], noise: Noise, depths: Tensor | None = None
    ) -> Tensor:
        """The generator's ``x_0`` [B, C, h, w] in float32.

        Args:
            network: The generator's network, or the training engine that wraps it.
            prompts: B prompts.
            noise: See :data:`rlhf_t2i.algorithm.student.Noise`.
            depths: The step at which each sample ends [B] (training); all K steps when None.
        """
        cond, schedule = self.conditioner.encode(prompts), self.student.schedule

        def predict(x_t: Tensor, t: Tensor, samples: Tensor) -> Tensor:
            part = cond if len(samples) == len(prompts) else cond[send(samples, self.device)]
            return schedule.to_x0(self._call(self.generator_family, schedule, network, x_t, t, part), x_t, t)

        return self.student.sample(predict, noise) if depths is None else self.student.rollout(predict, noise, depths)

    def predict(self, network: NetworkCall, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The raw output of a network [B, C, h, w], float32.

        Args:
            network: The reference's network or the assistant's, or the training engine that wraps it.
            x_t: [B, C, h, w].
            t: Timesteps [B] in thousandths.
            cond: The conditioning of the batch.
        """
        return self._call(self.family, self.schedule, network, x_t, t, cond)

    def _call(
        self, family: Family, schedule: Schedule, network: NetworkCall, x_t: Tensor, t: Tensor, cond: Conditioning
    ) -> Tensor:
        module = cast(nn.Module, getattr(network, "module", network))
        weights = next(module.parameters()).dtype
        # float32 weights compute under autocast, weights of the compute dtype as they are.
        mixed = weights == torch.float32 and self.dtype != torch.float32
        with torch.autocast(x_t.device.type, self.dtype) if mixed else nullcontext():
            time = send(schedule.network_time(t), x_t.device)
            return family.predict(network, x_t.to(weights), time, cond).float()

    def denoise(self, network: NetworkCall, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The x0-prediction ``D(x_t)`` of a network [B, C, h, w]; arguments as for :meth:`predict`."""
        return self.schedule.to_x0(self.predict(network, x_t, t, cond), x_t, t)


def _check_whole(key: str, timesteps: Sequence[float], schedule: Schedule) -> None:
    """Refuse timesteps between those that a variance-preserving model was trained at: it would be called at another."""
    between = next((t for t in timesteps if not float(t).is_integer()), None)
    if between is not None and isinstance(schedule, VPSchedule):
        raise UsageError(f"{key}: {between:g} is no whole number, and the reference knows no timesteps in between")
