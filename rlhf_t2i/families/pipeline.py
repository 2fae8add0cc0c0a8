"""Families that are stored as diffusers pipelines: reading their parts, decoding with their VAE, exporting them."""

from __future__ import annotations

import inspect
import json
import shutil
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm.student import Student
from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.families import decoders, snapshot, sources, weights
from rlhf_t2i.families.base import Config, Decoder
from rlhf_t2i.families.conditioning import PromptFamily, limit_length
from rlhf_t2i.families.sources import ModelRef
from rlhf_t2i.utils import files, fingerprints

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

_TRAINING_SCHEDULER = "training_scheduler_config.json"
# Configuration keys that may differ between two networks of one structure.
_NOT_STRUCTURE = ("sample_size", "dropout")


@dataclass(frozen=True)
class ExportScheduler:
    """A scheduler, and the arguments that a pipeline call needs besides ``num_inference_steps``; usually none."""

    scheduler: SchedulerMixin
    arguments: dict[str, object] = field(default_factory=dict)


class PipelineFamily(PromptFamily):
    """A family whose models are folders that ``DiffusionPipeline.from_pretrained`` loads."""

    network_class: ClassVar[str]
    """The network's class in diffusers."""
    patch_size: ClassVar[int] = 1
    """Latents per side of a token; the latents' sides are multiples of it."""
    side_multiple: ClassVar[int] = 1
    """Pixels of which the pipeline's own check asks height and width to be multiples, whatever the decoder's factor."""
    decoder_classes: ClassVar[tuple[str, ...]]
    """The classes in diffusers that decode its latents."""

    # -- configuration ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """See :meth:`Family.check`."""
        self.schedule(*self.native_size())
        for part in self.encoder_parts:
            self.part_class(part)

    @cached_property
    def network_config(self) -> Config:
        """See :attr:`Family.network_config`."""
        wanted = f"{sources.INDEX} names {self.index['_class_name']}, whose network is a {self.network_class}"
        try:
            config = sources.read_json(self.reference, f"{self.network_part}/config.json")
        except UsageError as error:
            raise UsageError(f"{error} ({wanted})") from None
        found = config.get("_class_name", self.network_class)
        if found != self.network_class:
            raise UsageError(
                f"{self._network_place} describes {sources.printable(found)}, but {wanted}: the folder is damaged or "
                "put together from two models"
            )
        return config

    @cached_property
    def scheduler_config(self) -> Config:
        """The configuration of the scheduler that the network was trained with.

        An exported model's own scheduler is made for its generator's steps; the reference's is beside it.
        """
        config = sources.read_json(self.reference, "scheduler/scheduler_config.json")
        # On the hub the second file is asked for only where the first one is surely an export's.
        cut = config.get("trained_betas") is not None or config.get("_class_name") == "FlowMatchLCMScheduler"
        if not (cut or self.reference.is_local):
            return config
        return sources.find_json(self.reference, f"scheduler/{_TRAINING_SCHEDULER}") or config

    def decoder_config(self, source: ModelRef | None) -> Config:
        """The configuration of the reference's decoder, or of another one.

        Raises:
            UsageError: Missing, damaged, or of a class that cannot decode this family's latents.
        """
        place, file = (self.reference, "vae/config.json") if source is None else (source, "config.json")
        try:
            config = sources.read_json(place, file)
        except UsageError as error:
            raise error if source is None else UsageError(f"models.vae: {error}") from None
        # The files of some references name no class; a folder that models.vae names may be anything.
        kind = config.get("_class_name", self.decoder_classes[0] if source is None else None)
        if kind not in self.decoder_classes:
            raise UsageError(
                f"{self._decoder_place(source)}: {sources.printable(kind)} does not decode the latents of {self.name}: "
                f"use {' or '.join(self.decoder_classes)}"
            )
        return config

    def _decoder_place(self, source: ModelRef | None) -> str:
        return f"{self.reference.location}/vae" if source is None else f"models.vae: {source.location}"

    def _decoder_class(self, source: ModelRef | None) -> type[nn.Module]:
        import diffusers

        return getattr(diffusers, self.decoder_config(source).get("_class_name", self.decoder_classes[0]))

    def scheduler_number(self, key: str, default: float | None = None) -> float:
        """A positive number of the scheduler's configuration.

        Raises:
            UsageError: It is missing or no such number: the file is damaged.
        """
        value = self.scheduler_config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            place = f"{self.reference.location}/scheduler/scheduler_config.json"
            raise UsageError(f"{place} has no positive number {key}: damaged")
        return float(value)

    def check_structure(self, source: ModelRef, what: str) -> None:
        """See :meth:`Family.check_structure`; the configuration is compared, or the tensors of a bare file."""
        file = weights.weight_file(source)
        if file is not None:
            self._check_tensors(file, source.name, what)
            return
        own, other = self._complete(self.network_config), self._complete(self._other_config(source, what))
        for key in sorted(own.keys() | other.keys()):
            if key not in _NOT_STRUCTURE and own.get(key) != other.get(key):
                raise UsageError(
                    f"{what}: {source.location} has {key} {sources.printable(other.get(key))}, the reference's network "
                    f"has {sources.printable(own.get(key))}: they are not of one structure"
                )

    def _other_config(self, source: ModelRef, what: str) -> Config:
        """The configuration of a network of this family's class."""
        part, local = self._subfolder(source), Path(source.location)
        file = f"{part}/config.json" if part else "config.json"
        if source.is_local and not (local / file).is_file() and (local / sources.INDEX).is_file():
            found = sources.pipeline_index(source).get("_class_name")
        else:
            config = sources.read_json(source, file)
            found = config.get("_class_name", self.network_class)
            if found == self.network_class:
                return config
        raise UsageError(
            f"{what}: {source.location} is a {sources.printable(found)}, but the reference is of the family "
            f"{self.name} ({' or '.join((*self.pipelines, self.network_class))})"
        )

    def _subfolder(self, source: ModelRef) -> str | None:
        """The network's folder in a pipeline; None for a network by itself."""
        whole = not source.is_local or (Path(source.location) / sources.INDEX).is_file()
        return self.network_part if whole else None

    def _check_tensors(self, file: Path, name: str, what: str) -> None:
        shapes = weights.tensor_shapes(file, name)
        own = {key: tuple(tensor.shape) for key, tensor in self.build_network().state_dict().items()}
        wrong = sorted(own.keys() ^ shapes.keys()) or sorted(key for key in own if own[key] != shapes[key])
        if wrong:
            raise UsageError(
                f"{what}: {file} does not fit the reference's network: {len(wrong)} weights differ, e.g. {wrong[0]}"
            )

    def _complete(self, config: Config) -> Config:
        """A configuration with the class's defaults filled in, without notes about files and versions."""
        parameters = inspect.signature(self._network_type().__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        merged = {key: config.get(key, default) for key, default in defaults.items()}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in merged.items()}

    @property
    def _network_place(self) -> str:
        return f"{self.reference.location}/{self.network_part}/config.json"

    def check_decoder(self, source: ModelRef | None) -> None:
        """See :meth:`Family.check_decoder`: latents of the network's channels, from a folder of a VAE."""
        config, place = self.decoder_config(source), f"{self._decoder_place(source)}/config.json"
        if source is not None and source.is_local and not weights.are_in(Path(source.location)):
            raise UsageError(f"{self._decoder_place(source)} holds no weights: it is not the folder of a VAE")
        channels = self.latents_of(config)
        decoders.check_numbers(config, channels, place)
        if channels != self._channels:
            raise UsageError(
                f"{place} decodes latents of {sources.printable(channels)} channels, but the network has "
                f"{self._channels}: they do not belong together"
            )
        if self._factor(source) != self._factor(None):
            raise UsageError(
                f"{place} makes {self._factor(source)} pixels of a latent, the reference's makes {self._factor(None)}: "
                "the images would have another size"
            )

    def latents_of(self, config: Config) -> object:
        """Channels of the latents that a decoder of this configuration decodes."""
        return config.get("latent_channels", 4)

    @property
    def _channels(self) -> int:
        channels = self.network_config.get("in_channels", 4)
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise UsageError(f"{self._network_place}: in_channels is not a number: the file is damaged")
        return channels

    def native_size(self) -> tuple[int, int]:
        """The network's sample size times the VAE's factor."""
        size = self.network_config.get("sample_size") or 128  # diffusers' pipelines have the same default
        sides = list(size) if isinstance(size, list | tuple) else [size, size]
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise UsageError(f"{self._network_place}: sample_size is not a size: the file is damaged")
        return sides[0] * self._factor(None), sides[1] * self._factor(None)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """See :meth:`Family.latent_shape`."""
        factor = self._factor(None)
        for name, pixels in (("height", height), ("width", width)):
            if pixels % (factor * self.patch_size):
                raise UsageError(
                    f"models.{name}: {pixels} is not a multiple of {factor * self.patch_size}, the pixels per latent"
                )
            if pixels % self.side_multiple:
                raise UsageError(
                    f"models.{name}: {pixels} is not a multiple of {self.side_multiple}, as {self.pipelines[0]} asks"
                )
        latents = height // factor, width // factor
        most = self.most_patches()
        if most is not None and max(latents) > most * self.patch_size:
            raise UsageError(
                f"models.height, models.width: {max(height, width)} is more than {most * self.patch_size * factor}, "
                "the largest side for which the network has positions"
            )
        return self._channels, *latents

    def most_patches(self) -> int | None:
        """Patches per side for which the network has positions; None where there is no limit."""
        return None

    def _factor(self, source: ModelRef | None) -> int:
        config = self.decoder_config(source)
        levels = config.get("block_out_channels") or config.get("decoder_block_out_channels")
        if not isinstance(levels, list) or not 1 <= len(levels) <= 16:
            raise UsageError(
                f"{self._decoder_place(source)}/config.json: block_out_channels is no list: not the folder of a VAE, "
                "or damaged"
            )
        return int(2 ** (len(levels) - 1))

    def encoders_identity(self) -> str:
        """See :meth:`Family.encoders_identity`; the folders that an export copies, but for the decoder."""
        if not self.reference.is_local:
            return super().encoders_identity()
        parts = [part for part in snapshot.copied_parts(self.index, self.network_part) if part != "vae"]
        return " ".join(f"{part}={fingerprints.of_path(Path(self.reference.location) / part)}" for part in parts)

    # -- networks ---------------------------------------------------------------------------------------------------

    def _network_type(self) -> type[nn.Module]:
        import diffusers

        return getattr(diffusers, self.network_class)

    def build_network(self) -> nn.Module:
        """See :meth:`Family.build_network`."""
        with torch.device("meta"):
            try:
                return self._network_type().from_config(self.network_config)
            except Exception as error:  # foreign numbers in a configuration raise whatever they meet first
                raise UsageError(f"{self._network_place} describes no network: {error}") from error

    def load_network(self, source: ModelRef | None = None) -> nn.Module:
        """See :meth:`Family.load_network`."""
        source = source or self.reference
        file = weights.weight_file(source)
        if file is not None:
            return weights.fill_network(self.build_network(), weights.read_state_dict(file, source.name), file)
        return weights.load_part(source, self._subfolder(source), self._network_type(), exact=True)

    @property
    def absent_parts(self) -> list[str]:
        """Parts that the pipeline demands and this model has not, as Stable Diffusion 3 without T5: to pass as None."""
        optional = self.pipeline_class._optional_components
        return [name for name in _absent(self.index) if name not in optional]

    def load_pipeline(self, source: ModelRef, dtype: torch.dtype) -> DiffusionPipeline:
        """See :meth:`Family.load_pipeline`."""
        from diffusers import DiffusionPipeline

        # Some pipelines demand that parts which the index leaves out are passed as such.
        absent = dict.fromkeys(_absent(sources.pipeline_index(source)))
        try:
            pipeline = DiffusionPipeline.from_pretrained(source.location, dtype=dtype, **absent, **source.kwargs)
        except Exception as error:
            raise UsageError(f"{source.location} cannot be loaded: {first_line(error)}") from error
        for part, tokenizer in pipeline.components.items():
            encoder = pipeline.components.get(part.replace("tokenizer", "text_encoder"))
            if part.startswith("tokenizer") and tokenizer is not None and encoder is not None:
                limit_length(f"{source.location}/{part}", tokenizer, encoder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def build_decoder(self, source: ModelRef | None = None) -> Decoder:
        """See :meth:`Family.build_decoder`."""
        config, cls = self.decoder_config(source), self._decoder_class(source)
        with torch.device("meta"):
            try:
                return self.make_decoder(cls.from_config(config))
            except Exception as error:  # as of a network
                raise UsageError(f"{self._decoder_place(source)} describes no decoder: {first_line(error)}") from error

    def load_decoder(self, source: ModelRef | None = None) -> Decoder:
        """See :meth:`Family.load_decoder`."""
        place, folder = (self.reference, "vae") if source is None else (source, None)
        return self.make_decoder(weights.load_part(place, folder, self._decoder_class(source)))

    @abstractmethod
    def make_decoder(self, vae: nn.Module) -> Decoder:
        """Wrap a VAE so that it decodes as the pipeline does."""

    # -- export -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def export_scheduler(self, student: Student) -> ExportScheduler:
        """The scheduler with which the pipeline draws the student's steps.

        Raises:
            UsageError: There is none.
        """

    def check_export(self, student: Student, vae: ModelRef | None) -> None:
        """See :meth:`Family.check_export`."""
        self.export_scheduler(student)
        if not self.reference.is_local:
            snapshot.fetch(self.reference, self.network_part, vae)
            return
        for part in snapshot.copied_parts(self.index, self.network_part):
            if not (Path(self.reference.location) / part).is_dir():
                raise UsageError(
                    f"{self.reference.location}/model_index.json names {part}, but that folder is missing: "
                    "the exported model could not be loaded"
                )
        snapshot.fetch(self.reference, self.network_part, vae)

    def export(
        self, folder: Path, weights: Mapping[str, Tensor], student: Student, dtype: torch.dtype, vae: ModelRef | None
    ) -> None:
        """See :meth:`Family.export`."""
        reference = snapshot.folder(self.reference, sources.INDEX)
        index = dict(self.index)
        for name in snapshot.copied_parts(index, self.network_part):
            snapshot.copy_part(reference / name, folder / name)
            snapshot.load_in_float32(folder / name / "config.json")
        if vae is not None:
            path = snapshot.folder(vae, sources.CONFIG)
            shutil.rmtree(folder / "vae", ignore_errors=True)
            snapshot.copy_part(path, folder / "vae")
            index["vae"] = ["diffusers", json.loads((path / "config.json").read_text("utf-8"))["_class_name"]]
        network = self.build_network()
        network.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, strict=True, assign=True)
        network.save_pretrained(folder / self.network_part)
        scheduler = self.export_scheduler(student).scheduler
        scheduler.save_pretrained(folder / "scheduler")
        files.write_json(folder / "scheduler" / _TRAINING_SCHEDULER, self.scheduler_config)
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        files.write_json(folder / "model_index.json", index)

    @property
    def loads_adapters(self) -> bool:
        """See :attr:`Family.loads_adapters`; PixArt's pipelines do not."""
        return hasattr(self.pipeline_class, "save_lora_weights")

    def export_adapter(self, folder: Path, factors: Mapping[str, Tensor]) -> None:
        """See :meth:`Family.export_adapter`; for ``load_lora_weights`` of the reference's pipeline."""
        layers = {name: factor.contiguous() for name, factor in factors.items()}
        self.pipeline_class.save_lora_weights(folder, **{f"{self.network_part}_lora_layers": layers})


def _absent(index: Config) -> list[str]:
    """The parts that model_index.json leaves out."""
    return [name for name, entry in index.items() if entry == [None, None]]
