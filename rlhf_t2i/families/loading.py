"""Load the networks of a run from diffusers folders, hub ids or a DMD2 ``.bin``; each once a process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import nn

from rlhf_t2i.algorithm.schedules import NoiseSchedule
from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.families import sources
from rlhf_t2i.families.compiling import compile_blocks
from rlhf_t2i.families.conditioning import Conditioner
from rlhf_t2i.families.frozen import freeze
from rlhf_t2i.families.networks import DTYPES, LatentDecoder
from rlhf_t2i.families.snapshot import is_fp16_alone
from rlhf_t2i.families.sources import ModelRef
from rlhf_t2i.recipe.schema import Models


class ModelStore:
    """The networks of a recipe, loaded on first use and shared by the roles of one process.

    Args:
        models: The recipe's ``models`` section.
        device: Where they live.
        precision: ``fp32`` or ``bf16``: the dtype of frozen networks. Trained ones are loaded in float32.
        compiled: Whether UNets and VAE are compiled when they first run.
    """

    def __init__(
        self, models: Models, device: torch.device, precision: str = "fp32", *, compiled: bool = False
    ) -> None:
        self.models, self.device, self.dtype = models, device, DTYPES[precision]
        self._compiled = compiled
        self._reference = sources.parse(models.reference)

    def check(self) -> None:
        """Read every configuration, but no weights: what is missing or foreign is refused before anything starts.

        Raises:
            UsageError: One sentence naming the folder or file.
        """
        for text in (self.models.generator, self.models.assistant, self.models.vae):
            if text is not None:
                sources.parse(text)
        _ = self.index, self.schedule, self.unet_config, self.latent_shape, self._has_second_encoder
        if self.models.generator_timestep >= len(self.schedule):
            raise UsageError(
                f"models.generator_timestep: {self.models.generator_timestep} is beyond the reference's "
                f"{len(self.schedule)} timesteps"
            )

    @cached_property
    def index(self) -> dict[str, Any]:
        """The reference's model_index.json."""
        return sources.pipeline_index(self._reference)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the reference."""
        from types import SimpleNamespace

        file = "scheduler/scheduler_config.json"
        config = sources.read_json(self._reference, file)
        try:
            return NoiseSchedule.from_scheduler(SimpleNamespace(config=config))
        except KeyError as error:
            raise UsageError(f"{self._reference.location}/{file} has no {error.args[0]}: it is damaged") from None
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise UsageError(f"{self._reference.location}/{file}: {first_line(error)}") from None

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        """The configuration of the reference's UNet; the generator and assistant share it."""
        return sources.read_json(self._reference, "unet/config.json")

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The configuration of the decoding VAE."""
        if self.models.vae:
            return sources.read_json(sources.parse(self.models.vae), "config.json")
        return sources.read_json(self._reference, "vae/config.json")

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one sample's latents."""
        channels = self.unet_config.get("in_channels")
        if not isinstance(channels, int) or channels < 1:
            raise UsageError(f"{self._reference.location}/unet/config.json: in_channels is no number: it is damaged")
        levels = self.vae_config.get("block_out_channels") or self.vae_config.get("decoder_block_out_channels")
        if not isinstance(levels, list) or not 1 <= len(levels) <= 16:
            place = self.models.vae or f"{self._reference.location}/vae"
            raise UsageError(f"{place}/config.json: block_out_channels is no list: not the folder of a VAE, or damaged")
        factor = 2 ** (len(levels) - 1)
        if self.models.resolution % factor:
            raise UsageError(f"models.resolution: {self.models.resolution} is not a multiple of the VAE's {factor}")
        size = self.models.resolution // factor
        return channels, size, size

    @property
    def _has_second_encoder(self) -> bool:
        """Whether the pipeline is SDXL's."""
        entry = self.index.get("text_encoder_2")
        found = isinstance(entry, list) and bool(entry) and entry[0] is not None
        if self.unet_config.get("addition_embed_type") == "text_time" and not found:
            raise UsageError(
                f"{self._reference.location}/model_index.json names no text_encoder_2, which its UNet needs: "
                "it is damaged or of another model"
            )
        return found

    @cached_property
    def conditioner(self) -> Conditioner:
        """Tokenizers and frozen text encoders of the reference."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        is_sdxl = self._has_second_encoder
        names = [("tokenizer", "text_encoder", CLIPTextModel)]
        if is_sdxl:
            names.append(("tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection))
        tokenizers, encoders = [], []
        for tokenizer_name, encoder_name, cls in names:
            encoder = self._part(encoder_name, cls.from_pretrained, dtype=self.dtype)
            # AutoTokenizer would ask for a config.json that a downloaded snapshot does not hold.
            tokenizer = self._part(tokenizer_name, CLIPTokenizer.from_pretrained)
            # Without its files transformers builds a tokenizer of a handful of tokens and says nothing.
            if not 16 <= len(tokenizer) <= encoder.config.vocab_size:
                raise UsageError(
                    f"{self._reference.location}/{tokenizer_name} has {len(tokenizer)} tokens but the text encoder "
                    f"knows {encoder.config.vocab_size}: the tokenizer's files are missing or foreign"
                )
            tokenizers.append(tokenizer)
            encoders.append(encoder)
        zero = is_sdxl and bool(self.index.get("force_zeros_for_empty_prompt", True))
        return Conditioner(tokenizers, encoders, self.models.resolution, zero).to(self.device)

    @cached_property
    def decoder(self) -> LatentDecoder:
        """The VAE; never in float16, which SDXL's overflows."""
        from diffusers import AutoencoderKL, AutoencoderTiny

        cls = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}.get(
            self.vae_config.get("_class_name", "AutoencoderKL")
        )
        if cls is None:
            raise UsageError(
                f"models.vae: {self.vae_config['_class_name']} is not supported: use AutoencoderKL or Tiny"
            )
        if self.models.vae:
            vae = _load(sources.parse(self.models.vae), None, cls.from_pretrained)
        else:
            vae = self._part("vae", cls.from_pretrained)
        if self.models.vae_slicing:
            vae.enable_slicing()
        if self.models.vae_tiling:
            vae.enable_tiling()
        if self._compiled:
            compile_blocks(vae)
        return LatentDecoder(vae).to(self.device, DTYPES[self.models.vae_precision], memory_format=torch.channels_last)

    def reference_unet(self) -> nn.Module:
        """A frozen copy of the reference UNet, in the compute dtype."""
        unet = self._unet(self._reference).to(self.device, self.dtype, memory_format=torch.channels_last)
        return freeze(unet)

    def assistant_unet(self) -> nn.Module:
        """The assistant's UNet in float32, to be trained."""
        source = self._reference if self.models.assistant is None else sources.parse(self.models.assistant)
        return self._unet(source).float().to(self.device)

    def generator_unet(self) -> nn.Module:
        """The generator's UNet in float32, to be trained or sampled."""
        return self._unet(sources.parse(self.models.generator)).float().to(self.device)

    def _unet(self, source: ModelRef) -> Any:
        unet = self._load_unet(source)
        if self._compiled:
            compile_blocks(unet)
        return unet

    def _load_unet(self, source: ModelRef) -> Any:
        from diffusers import UNet2DConditionModel

        if source.file is not None:
            return self._unet_from_state(Path(sources.hub_file(source, source.file)))
        if source.is_local and source.location.endswith((".bin", ".safetensors")):
            return self._unet_from_state(Path(source.location))
        subfolder = "unet" if not source.is_local or (Path(source.location) / "model_index.json").is_file() else None
        unet = _load(source, subfolder, UNet2DConditionModel.from_pretrained)
        for key in ("in_channels", "cross_attention_dim", "addition_embed_type"):
            if unet.config.get(key) != self.unet_config.get(key):
                raise UsageError(
                    f"{source.location}: its UNet has {key} {unet.config.get(key)}, the reference's has "
                    f"{self.unet_config.get(key)}: they are not of one family"
                )
        return unet

    def _unet_from_state(self, path: Path) -> Any:
        """A bare state dict (DMD2's published file) in the reference's architecture; every key must match."""
        from diffusers import UNet2DConditionModel
        from safetensors.torch import load_file

        try:
            if path.suffix == ".safetensors":
                state = load_file(path)
            else:
                # Files of the format before torch 1.6 are no zip archives and cannot be mapped.
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        except Exception as error:
            raise UsageError(f"{path} is damaged or not a file of weights: {first_line(error)}") from None
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(self.unet_config)
        try:
            unet.load_state_dict(state, strict=True, assign=True)
        except (RuntimeError, AttributeError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"{path} does not fit the reference's UNet: {reason}") from None
        return unet

    def _part(self, name: str, loader: Callable[..., Any], **kwargs: Any) -> Any:
        return _load(self._reference, name, loader, **kwargs)


def _load(source: ModelRef, subfolder: str | None, loader: Callable[..., Any], **kwargs: Any) -> Any:
    """Call a ``from_pretrained``; what goes wrong names the folder, not a traceback."""
    where = f"{source.location}/{subfolder}" if subfolder else source.location
    if source.is_local and not Path(where).is_dir():
        raise UsageError(f"{where} is missing: {source.location} is not a complete model folder")
    if subfolder:
        kwargs["subfolder"] = subfolder
    if source.is_local and is_fp16_alone(Path(where)):
        kwargs["variant"] = "fp16"
    if "from_pretrained" in getattr(loader, "__qualname__", "") and _is_model(loader):
        kwargs.setdefault("use_safetensors", True)
        kwargs["output_loading_info"] = True
    try:
        loaded = loader(source.location, **source.kwargs, **kwargs)
    except Exception as error:
        damaged = damaged_weights(Path(where)) if source.is_local else None
        raise UsageError(f"{where} cannot be loaded: {damaged or first_line(error)}") from error
    if not isinstance(loaded, tuple):
        return loaded
    model, info = loaded
    # Both libraries fill a missing weight with random numbers and go on. position_ids of old files are computed now.
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    if missing:
        raise UsageError(f"{where} lacks {len(missing)} weights of its {type(model).__name__}, e.g. {missing[0]}")
    return model


def damaged_weights(folder: Path) -> str | None:
    """Which safetensors file of a folder cannot be read or is absent, as a phrase; None when all are whole."""
    from safetensors import SafetensorError, safe_open

    for index in sorted(folder.glob("*.safetensors.index*.json")):
        try:
            shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return f"{index.name} is damaged"
        absent = sorted(shard for shard in shards if not (folder / shard).is_file())
        if absent:
            return f"{absent[0]} is missing ({index.name} names it)"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                weights.keys()
        except (SafetensorError, OSError) as error:
            return f"{file.name} is damaged or cut short ({first_line(error)})"
    return None


def _is_model(loader: Callable[..., Any]) -> bool:
    """Whether the loader belongs to a network (which may be asked for safetensors), not to a tokenizer."""
    owner = getattr(loader, "__self__", None)
    return isinstance(owner, type) and issubclass(owner, nn.Module)
