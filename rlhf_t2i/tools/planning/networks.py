"""The networks a recipe names, as far as their configurations are at hand: no weights are read."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import published, sources
from rlhf_t2i.families.published import Config
from rlhf_t2i.plugins import traits
from rlhf_t2i.plugins.base import Footprint
from rlhf_t2i.recipe.schema import Lora, Recipe
from rlhf_t2i.tools.planning.zero import Sizes, sizes_of


class Networks:
    """The configurations of a recipe's networks, as far as they are at hand."""

    def __init__(self, recipe: Recipe) -> None:
        self.notes: list[str] = []
        self._reference = sources.parse(recipe.models.reference)
        self.unet = self._config("unet")
        self.text = [c for c in (self._config("text_encoder"), self._config("text_encoder_2", optional=True)) if c]
        self.vae = self._vae(recipe)
        self.latents = self._latents(recipe.models.height or self._native())
        self.rewards = self._rewards(recipe)

    def _native(self) -> int:
        levels = (self.vae or {}).get("block_out_channels") or [0] * 4
        return int((self.unet or {}).get("sample_size") or 128) * 2 ** (len(levels) - 1)

    def _config(self, part: str, optional: bool = False) -> Config | None:
        file = f"{part}/config.json"
        if not self._reference.is_local:
            family = published.PUBLISHED.get(self._reference.location)
            if family is not None:
                return family.parts.get(part)
        return self._read(self._reference, file, optional)

    def _read(self, source: sources.ModelRef, file: str, optional: bool = False) -> Config | None:
        if source.is_local:
            if optional and not (Path(source.location) / file).is_file():
                return None
            return sources.read_json(source, file)
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source.location, file, revision=source.revision)
        if isinstance(cached, str):
            return sources.read_json(sources.ModelRef(str(Path(cached).parent.resolve())), Path(cached).name)
        if not optional:
            self.notes.append(f"{source.location} is not in the hub cache: {file} is not counted")
        return None

    def _vae(self, recipe: Recipe) -> Config | None:
        if recipe.models.vae is None:
            return self._config("vae")
        source = sources.parse(recipe.models.vae)
        return published.PUBLISHED_VAES.get(source.location) or self._read(source, "config.json")

    def _latents(self, resolution: int) -> tuple[int, int, int]:
        channels = int((self.unet or {}).get("in_channels", 4))
        vae = self.vae or {}
        levels = vae.get("block_out_channels") or vae.get("decoder_block_out_channels") or [0] * 4
        factor = 2 ** (len(levels) - 1)
        if resolution % factor:
            raise UsageError(f"models.height: {resolution} is not a multiple of the VAE's {factor}")
        return channels, resolution // factor, resolution // factor

    def _rewards(self, recipe: Recipe) -> dict[str, Footprint | None]:
        found = {reward.key: reward.footprint for reward in traits.resolve(recipe).rewards}
        for label, footprint in found.items():
            if footprint is None:
                self.notes.append(f"reward {label!r}: its network is not known here, so it is not counted")
        return found


def count_footprint(footprint: Footprint | None) -> int | None:
    """Parameters of a reward's network; None where it is not known."""
    if footprint is None:
        return None
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in footprint.build().parameters())


def count_parameters(config: Config | None) -> int | None:
    """Parameters of a configuration; None where it is absent or not one this project builds."""
    return None if config is None else _counted(json.dumps(config, sort_keys=True, default=str))


def parameter_sizes(config: Config | None) -> Sizes:
    """Of the network of a configuration; zeros where :func:`count_parameters` is None."""
    if config is None or not count_parameters(config):
        return Sizes(0)
    return _sizes(json.dumps(config, sort_keys=True, default=str))


@cache
def _sizes(config: str) -> Sizes:
    return sizes_of([p.numel() for p in published.build_on_meta(json.loads(config)).parameters()])


def adapter_sizes(config: Config | None, settings: Lora) -> Sizes:
    """Of a UNet's low-rank adapters, a matrix of ``rank x inputs`` and one of ``outputs x rank`` a layer."""
    if config is None:
        return Sizes(0)
    return _adapters(
        json.dumps(config, sort_keys=True, default=str),
        settings.rank,
        tuple(settings.targets or ("to_q", "to_k", "to_v", "to_out.0")),
    )


@cache
def _adapters(config: str, rank: int, targets: tuple[str, ...]) -> Sizes:
    network = published.build_on_meta(json.loads(config))
    layers = [
        layer
        for name, layer in network.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in targets) and hasattr(layer, "in_features")
    ]
    return sizes_of([rank * n for layer in layers for n in (layer.in_features, layer.out_features)])


@cache
def _counted(config: str) -> int | None:
    """Looking for a change that fits plans many times over the same networks."""
    try:
        return published.count_parameters(json.loads(config))
    except (ValueError, TypeError, KeyError):
        return None
