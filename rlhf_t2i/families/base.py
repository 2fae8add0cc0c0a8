"""What a model family is: everything about a network that the training loop must not know (docs/extending.md).

A :class:`Family` is bound to the reference's folder or hub id. It says how prompts become conditioning, what latents
look like, how the network is called and what it predicts, how latents are decoded, and what an export contains.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm.schedules import Schedule
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families.recomputing import checkpoint_layers
from rlhf_t2i.families.sources import Config, ModelRef
from rlhf_t2i.utils import fingerprints

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

    from rlhf_t2i.algorithm.student import Student

NetworkCall = Callable[..., Sequence[Tensor]]
"""A network of diffusers, or the training engine that wraps it: the first of its outputs is the prediction."""


@dataclass(frozen=True)
class Conditioning:
    """What a network is told about a batch besides ``x_t`` and the time: named tensors, each [B, ...].

    Prompts of different lengths are padded and travel with a mask among the tensors.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, samples: Tensor | slice) -> Conditioning:
        """The conditioning of some samples, by position or slice."""
        return Conditioning({name: tensor[samples] for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """One batch after the other."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Conditioner(nn.Module, ABC):
    """Encodes prompts with frozen text encoders, and keeps what it encoded last.

    Subclasses register their encoders as modules and define :meth:`encode_one`.

    Args:
        cache_bytes: Memory for kept prompts, on the encoders' device: T5's 512 tokens take 8 MB per prompt.
    """

    def __init__(self, cache_bytes: int = 2**29) -> None:
        super().__init__()
        self._cache_bytes = cache_bytes
        self._cache: dict[str, dict[str, Tensor]] = {}
        self._one_at_a_time = threading.Lock()  # transformers' tokenizers keep the padding of a call as state

    @abstractmethod
    def encode_one(self, prompt: str) -> dict[str, Tensor]:
        """The row of one prompt, by name; float32 tensors on the encoders' device."""

    def unconditional_row(self) -> dict[str, Tensor]:
        """The row of the unconditional branch of classifier-free guidance: the empty prompt's, unless overridden."""
        return {name: tensor[0] for name, tensor in self.encode([""]).tensors.items()}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of B prompts; threads may ask at once."""
        with self._one_at_a_time:
            self._fill_cache(prompts)
            return _stack([self._cache[prompt] for prompt in prompts])

    @torch.no_grad()
    def unconditional(self, batch: int) -> Conditioning:
        """The conditioning of B samples without their prompts."""
        row = self.unconditional_row()
        return Conditioning({name: tensor.expand(batch, *tensor.shape) for name, tensor in row.items()})

    @torch.no_grad()
    def _fill_cache(self, prompts: Sequence[str]) -> None:
        distinct = list(dict.fromkeys(prompts))
        rows = {prompt: self._cache.pop(prompt, None) for prompt in distinct}
        # One at a time: in a batch the last bits of an embedding depend on the batch's size, and so on which prompts
        # happened to be cached; a resumed run would then differ from an uninterrupted one.
        for prompt in distinct:
            self._cache[prompt] = rows[prompt] or self.encode_one(prompt)
        kept = sum(map(_bytes, self._cache.values()))
        for prompt in list(self._cache)[: -len(distinct)]:  # the batch's own are last, and stay
            if kept <= self._cache_bytes:
                break
            kept -= _bytes(self._cache.pop(prompt))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Conditioner:
        # A move to another device or dtype makes cached embeddings stale.
        self._cache.clear()
        return super()._apply(fn, recurse)


def _bytes(row: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in row.values())


def _stack(rows: Sequence[dict[str, Tensor]]) -> Conditioning:
    return Conditioning({name: torch.stack([row[name] for row in rows]) for name in rows[0]})


class Decoder(nn.Module, ABC):
    """Latents [B, C, h, w] to images [B, 3, H, W] in [0, 1]."""

    block_names: ClassVar[tuple[str, ...]] = ()
    """Class names of the repeated blocks that ``optimization.compile`` compiles one by one."""
    attention_names: ClassVar[tuple[str, ...]] = ()
    """Class names of the attention layers that ``models.vae_precision: mixed`` computes in bf16."""

    def limit_memory(self, slicing: bool, tiling: bool) -> None:
        """Decode image by image, or tile by tile (``models.vae_slicing``, ``models.vae_tiling``)."""
        if slicing or tiling:
            raise UsageError("models.vae_slicing, models.vae_tiling: this family's decoder has neither")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, C, h, w] of images in [0, 1], the posterior's mean; for features of images."""
        raise NotImplementedError(f"{type(self).__name__} cannot encode images")

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], float32; gradients flow."""


class Family(ABC):
    """One kind of text-to-image model, bound to the folder or hub id of a reference.

    Args:
        reference: The reference.
        index: Its model_index.json.
    """

    name: ClassVar[str]
    """The family's name, as it is registered under ``rlhf_t2i.families``."""
    pipelines: ClassVar[tuple[str, ...]]
    """``_class_name`` of the model_index.json files that it reads."""
    network_part: ClassVar[str]
    """The folder of the denoising network in a pipeline."""
    block_names: ClassVar[tuple[str, ...]] = ()
    """Class names of the repeated blocks that ``optimization.compile`` compiles one by one."""
    adapter_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the linear layers that take LoRA by default."""
    guides: ClassVar[bool] = True
    """Whether the pipeline has classifier-free guidance."""
    convention: ClassVar[Literal["omega", "one_plus"]] = "omega"
    """How the pipeline reads its guidance scale, as ``algorithm.cfg.convention``."""

    def __init__(self, reference: ModelRef, index: Config) -> None:
        self.reference, self.index = reference, dict(index)

    # -- configuration: reads JSON files, no weights ------------------------------------------------------------------

    @property
    @abstractmethod
    def network_config(self) -> Config:
        """The configuration of the reference's network; generator and assistant share its structure."""

    @abstractmethod
    def check(self) -> None:
        """Refuse a damaged or foreign folder before anything heavy starts.

        Raises:
            UsageError: One sentence naming the folder or file.
        """

    @abstractmethod
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels for which the reference was trained."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of one sample's latents.

        Raises:
            UsageError: The size is no multiple of the decoder's factor, or a configuration is damaged.
        """

    @abstractmethod
    def schedule(self, height: int, width: int) -> Schedule:
        """The noise schedule, which may depend on the image size."""

    @abstractmethod
    def default_timesteps(self, steps: int) -> tuple[float, ...]:
        """The K timesteps that the exported pipeline runs in ``num_inference_steps=K``, in thousandths."""

    @abstractmethod
    def check_structure(self, source: ModelRef, what: str) -> None:
        """Refuse a network that is not of the reference's structure, without reading its weights.

        Args:
            source: A generator or assistant.
            what: Its key in the recipe.

        Raises:
            UsageError: Names the first difference.
        """

    @abstractmethod
    def check_decoder(self, source: ModelRef | None) -> None:
        """Refuse a decoder for other latents; ``None`` is the reference's own.

        Raises:
            UsageError: One sentence naming the folder.
        """

    def for_generator(self, source: ModelRef) -> Family:
        """The family that loads, calls and exports a generator: this one, unless its network has inputs of its own.

        Args:
            source: The generator.

        Raises:
            UsageError: Its configuration is missing or damaged.
        """
        return self

    def network_place(self, source: ModelRef) -> ModelRef:
        """Where a network's weights are; equal for two ways to name the same ones."""
        part = Path(source.location, self.network_part)
        return ModelRef(str(part)) if source.is_local and part.is_dir() else source

    def encoders_identity(self) -> str:
        """What text encoders and tokenizers are, by content or commit; names cached embeddings."""
        ref = self.reference
        return fingerprints.of_path(ref.location) if ref.is_local else f"{ref.location}@{ref.revision}"

    # -- networks ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def build_network(self) -> nn.Module:
        """The network of :attr:`network_config` without memory, on the meta device."""

    @abstractmethod
    def build_decoder(self, source: ModelRef | None = None) -> Decoder:
        """The decoder of :meth:`load_decoder` without memory, on the meta device."""

    @abstractmethod
    def build_text_encoders(self) -> nn.Module:
        """The text encoders of :meth:`load_conditioner` without memory, on the meta device."""

    @abstractmethod
    def load_network(self, source: ModelRef | None = None) -> nn.Module:
        """A network with its weights, on the CPU: the reference's, or one of the same structure.

        Raises:
            UsageError: Missing, damaged, or of another structure.
        """

    @abstractmethod
    def load_conditioner(self, dtype: torch.dtype, height: int, width: int) -> Conditioner:
        """The frozen text encoders in a dtype, on the CPU."""

    @abstractmethod
    def load_decoder(self, source: ModelRef | None = None) -> Decoder:
        """The frozen decoder in float32, on the CPU: the reference's, or another one for the same latents."""

    def load_pipeline(self, source: ModelRef, dtype: torch.dtype) -> DiffusionPipeline:
        """The library's own pipeline of a model of this family, which draws in many steps with guidance.

        It is called with ``prompt``, ``num_inference_steps``, ``guidance_scale``, ``height``, ``width``, ``generator``
        and ``output_type``, as pipelines of diffusers are.

        Raises:
            UsageError: The model cannot be loaded, or the family has none.
        """
        raise UsageError(
            f"{source.location}: the model family {self.name} has no pipeline that draws in many steps; its few-step "
            "generators can be drawn"
        )

    @abstractmethod
    def predict(self, network: NetworkCall, x_t: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """Call the network and return its raw output [B, C, h, w].

        Args:
            network: The network, or the training engine that wraps it.
            x_t: [B, C, h, w] in the dtype of the network's weights.
            time: The schedule's :meth:`~rlhf_t2i.algorithm.schedules.Schedule.network_time` [B].
            cond: The conditioning of the batch, on the same device.
        """

    def to_scheduler(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] in the layout that the pipeline's scheduler steps on; the same in most pipelines.

        A stochastic scheduler draws its noise in that layout.
        """
        return latents

    def from_scheduler(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The inverse of :meth:`to_scheduler`, for images of ``height`` x ``width`` pixels."""
        return latents

    def pipeline_guidance(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """How the pipeline combines two raw outputs [B, C, h, w] of the network in classifier-free guidance.

        For :mod:`rlhf_t2i.tools.family_check`. Training uses the linear form, whatever a pipeline adds to it.
        """
        return unconditional + scale * (conditional - unconditional)

    def sampler_for_check(self) -> SchedulerMixin | None:
        """A scheduler with which the pipeline's last step ends at the (guided) x0-prediction.

        For :mod:`rlhf_t2i.tools.family_check`. None stands for diffusers' Euler scheduler of the schedule.
        """
        return None

    def sampling_call(self, steps: int, scale: float, batch: int = 1) -> dict[str, object]:
        """Arguments of the pipeline's call that draw a batch in many steps with a user's guidance scale.

        Args:
            steps: Sampling steps.
            scale: Of classifier-free guidance, where the pipeline has it.
            batch: Prompts in the call.
        """
        return self.plain_call(steps) | {"guidance_scale": scale}

    def guided_call(self, steps: int, scale: float) -> dict[str, object]:
        """Arguments of the pipeline's call for classifier-free guidance, for :mod:`rlhf_t2i.tools.family_check`."""
        return self.sampling_call(steps, scale)

    def plain_call(self, steps: int) -> dict[str, object]:
        """Arguments of the pipeline's call that draw with an exported generator of so many steps."""
        return {"guidance_scale": 0.0}

    @abstractmethod
    def example_conditioning(self, batch: int, height: int, width: int, dtype: torch.dtype) -> Conditioning:
        """Uninitialized conditioning of the right shapes on torch's current default device, for planning."""

    def enable_checkpointing(self, network: nn.Module) -> None:
        """Recompute the network's activations in the backward pass; in place.

        As diffusers' networks do it, or the layers of every ``nn.ModuleList``.
        """
        if not hasattr(network, "enable_gradient_checkpointing"):
            checkpoint_layers(network)
            return
        network.enable_gradient_checkpointing()
        # diffusers recomputes in training mode only; its denoisers have no dropout or batch norm to wake.
        network.train()

    # -- export -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def check_export(self, student: Student, vae: ModelRef | None) -> None:
        """Check before training that an export can be written; fetch what it will copy from the hub.

        Raises:
            UsageError: A part is missing, or no scheduler of the pipeline draws the student's steps.
        """

    @abstractmethod
    def export(
        self, folder: Path, weights: Mapping[str, Tensor], student: Student, dtype: torch.dtype, vae: ModelRef | None
    ) -> None:
        """Write a folder that plain diffusers draws with ``num_inference_steps=K`` and no guidance.

        Args:
            folder: An empty folder.
            weights: The network's state dict.
            student: The generator's steps.
            dtype: Of the stored network.
            vae: The decoder that takes the reference's place.
        """

    @property
    def loads_adapters(self) -> bool:
        """Whether the library's pipeline loads adapters from a file, as :meth:`export_adapter` writes it."""
        return False

    def export_adapter(self, folder: Path, factors: Mapping[str, Tensor]) -> None:
        """Write the generator's adapters alone, for a family that :attr:`loads_adapters`.

        Args:
            folder: An empty folder.
            factors: See :func:`rlhf_t2i.families.adapters.factors`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no file of adapters")
