"""Families that are stored as diffusers pipelines: reading their parts, decoding with their VAE, exporting them."""

from __future__ import annotations

import inspect
import json
import shutil
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlhf_t2i.algorithm.student import Student
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import snapshot, sources, weights
from rlhf_t2i.families.base import Config, Decoder, Family
from rlhf_t2i.families.frozen import freeze_convs
from rlhf_t2i.families.sources import ModelRef
from rlhf_t2i.families.vp_schedulers import ExportScheduler
from rlhf_t2i.utils import files

_TRAINING_SCHEDULER = "training_scheduler_config.json"
# Configuration keys that may differ between two networks of one structure.
_NOT_STRUCTURE = ("sample_size", "dropout")


class PipelineFamily(Family):
    """A family whose models are folders that ``DiffusionPipeline.from_pretrained`` loads."""

    network_class: ClassVar[str]
    """The network's class in diffusers."""
    decoder_classes: ClassVar[tuple[str, ...]]
    """The classes in diffusers that decode its latents."""

    # -- configuration ----------------------------------------------------------------------------------------------

    @cached_property
    def network_config(self) -> Config:
        """See :attr:`Family.network_config`."""
        return sources.read_json(self.reference, f"{self.network_part}/config.json")

    @cached_property
    def scheduler_config(self) -> Config:
        """The configuration of the scheduler that the network was trained with.

        An exported model's own scheduler may be cut off where its generator starts; the whole one is beside it.
        """
        config = sources.read_json(self.reference, "scheduler/scheduler_config.json")
        if config.get("trained_betas") is None:
            return config
        return sources.find_json(self.reference, f"scheduler/{_TRAINING_SCHEDULER}") or config

    def decoder_config(self, source: ModelRef | None) -> Config:
        """The configuration of the reference's decoder, or of another one.

        Raises:
            UsageError: Missing, damaged, or of a class that cannot decode this family's latents.
        """
        config = (
            sources.read_json(self.reference, "vae/config.json")
            if source is None
            else sources.read_json(source, "config.json")
        )
        kind = config.get("_class_name", self.decoder_classes[0])
        if kind not in self.decoder_classes:
            raise UsageError(
                f"{self._decoder_place(source)}: {sources.printable(kind)} does not decode the latents of {self.name}: "
                f"use {' or '.join(self.decoder_classes)}"
            )
        return config

    def _decoder_place(self, source: ModelRef | None) -> str:
        return f"{self.reference.location}/vae" if source is None else source.location

    def scheduler_number(self, key: str, default: float | None = None) -> float:
        """A number of the scheduler's configuration.

        Raises:
            UsageError: It is missing or no number: the file is damaged.
        """
        value = self.scheduler_config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"{self.reference.location}/scheduler/scheduler_config.json has no number {key}: damaged")
        return float(value)

    def check_structure(self, source: ModelRef, what: str) -> None:
        """Refuse a network whose structure is not the reference's, from its configuration or its tensor names.

        Args:
            source: The generator or assistant.
            what: Its key in the recipe.

        Raises:
            UsageError: Names the first difference.
        """
        file = weights.weight_file(source)
        if file is not None:
            self._check_tensors(file, source.name, what)
            return
        other = self._complete(sources.read_json(source, self._network_file(source)))
        own = self._complete(self.network_config)
        for key in sorted(own.keys() | other.keys()):
            if key not in _NOT_STRUCTURE and own.get(key) != other.get(key):
                raise UsageError(
                    f"{what}: {source.location} has {key} {sources.printable(other.get(key))}, the reference's network "
                    f"has {sources.printable(own.get(key))}: they are not of one structure"
                )

    def _network_file(self, source: ModelRef) -> str:
        """Where a network's configuration is: in a pipeline's folder, or in its own."""
        return f"{self.network_part}/config.json" if self._subfolder(source) else "config.json"

    def _subfolder(self, source: ModelRef) -> str | None:
        whole = not source.is_local or (Path(source.location) / "model_index.json").is_file()
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
        chosen = {key: value for key, value in config.items() if not key.startswith("_")}
        merged = {**defaults, **{key: value for key, value in chosen.items() if key in defaults}}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in merged.items()}

    # -- networks ---------------------------------------------------------------------------------------------------

    def _network_type(self) -> Any:
        import diffusers

        return getattr(diffusers, self.network_class)

    def build_network(self) -> nn.Module:
        """See :meth:`Family.build_network`."""
        with torch.device("meta"):
            try:
                return self._network_type().from_config(self.network_config)
            except Exception as error:  # foreign numbers in a configuration raise whatever they meet first
                raise UsageError(
                    f"{self.reference.location}/{self.network_part}/config.json describes no network: {error}"
                ) from error

    def load_network(self, source: ModelRef | None = None) -> nn.Module:
        """See :meth:`Family.load_network`."""
        source = source or self.reference
        file = weights.weight_file(source)
        if file is not None:
            return weights.fill_network(self.build_network(), weights.read_state_dict(file, source.name), file)
        return weights.load_part(source, self._subfolder(source), self._network_type().from_pretrained)

    def build_decoder(self, source: ModelRef | None = None) -> Decoder:
        """See :meth:`Family.build_decoder`."""
        import diffusers

        config = self.decoder_config(source)
        with torch.device("meta"):
            cls = getattr(diffusers, config.get("_class_name", self.decoder_classes[0]))
            return self.make_decoder(cls.from_config(config))

    def load_decoder(self, source: ModelRef | None = None) -> Decoder:
        """See :meth:`Family.load_decoder`."""
        import diffusers

        kind = self.decoder_config(source).get("_class_name", self.decoder_classes[0])
        loader = getattr(diffusers, kind).from_pretrained
        vae = (
            weights.load_part(self.reference, "vae", loader)
            if source is None
            else weights.load_part(source, None, loader)
        )
        return self.make_decoder(vae)

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
        reference = snapshot.pipeline_folder(self.reference)
        index = dict(self.index)
        for name in snapshot.copied_parts(index, self.network_part):
            snapshot.copy_part(reference / name, folder / name)
            _load_in_float32(folder / name / "config.json")
        if vae is not None:
            path = snapshot.network_folder(vae)
            shutil.rmtree(folder / "vae", ignore_errors=True)
            snapshot.copy_part(path, folder / "vae")
            index["vae"] = ["diffusers", json.loads((path / "config.json").read_text("utf-8"))["_class_name"]]
        network: Any = self.build_network()
        network.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, strict=True, assign=True)
        network.save_pretrained(folder / self.network_part)
        scheduler = self.export_scheduler(student).scheduler
        scheduler.save_pretrained(folder / "scheduler")
        files.write_json(folder / "scheduler" / _TRAINING_SCHEDULER, self.scheduler_config)
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        files.write_json(folder / "model_index.json", index)


class KLDecoder(Decoder):
    """An AutoencoderKL or AutoencoderTiny; images are clamped as DMD2 and ReFL do: a saturated pixel has no gradient.

    Args:
        vae: The autoencoder.
        shift: Added to the latents after they are scaled, from the pipeline's own decoding.
        mean: Per-channel mean of the latents [C], where the pipeline normalizes with one.
        std: Per-channel standard deviation [C].
    """

    block_names = ("ResnetBlock2D", "BasicTransformerBlock", "AutoencoderTinyBlock")

    def __init__(
        self, vae: nn.Module, shift: float = 0.0, mean: list[float] | None = None, std: list[float] | None = None
    ) -> None:
        super().__init__()
        self.vae: Any = freeze_convs(vae)
        self.scaling_factor = float(self.vae.config.scaling_factor)
        self.shift = shift
        self._mean = None if mean is None else torch.tensor(mean).reshape(1, -1, 1, 1)
        self._std = None if std is None else torch.tensor(std).reshape(1, -1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """See :meth:`Decoder.decode`."""
        weights_dtype = next(self.vae.parameters()).dtype
        scaled = latents.float()
        if self._mean is not None and self._std is not None:
            scaled = scaled * self._std.to(scaled) / self.scaling_factor + self._mean.to(scaled)
        else:
            scaled = scaled / self.scaling_factor + self.shift
        image = self.vae.decode(
            scaled.to(weights_dtype).contiguous(memory_format=torch.channels_last), return_dict=False
        )[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def limit_memory(self, slicing: bool, tiling: bool) -> None:
        """See :meth:`Decoder.limit_memory`."""
        if slicing:
            self.vae.enable_slicing()
        if tiling:
            self.vae.enable_tiling()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See :meth:`Decoder.encode`."""
        weights_dtype = next(self.vae.parameters()).dtype
        encoded = self.vae.encode(images.to(weights_dtype) * 2 - 1)
        return (encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents).float()


def _load_in_float32(config: Path) -> None:
    """Let transformers load an encoder as diffusers loads the network: by itself it takes the stored weights' dtype.

    A caller that asks the pipeline for another dtype still gets it, everywhere.
    """
    if not config.is_file():
        return
    data = json.loads(config.read_text("utf-8"))
    if "architectures" in data:  # of transformers
        data.pop("torch_dtype", None)  # the key's name before transformers 5
        files.write_json(config, data | {"dtype": "float32"})
