"""Reading weights: one part of a pipeline folder, or a bare file; what is wrong names the folder, not a traceback."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.families import sources
from rlhf_t2i.families.snapshot import is_fp16_alone
from rlhf_t2i.families.sources import ModelRef


def load_part(
    source: ModelRef, subfolder: str | None, cls: type[nn.Module], exact: bool = False, **kwargs: object
) -> nn.Module:
    """A network, text encoder or tokenizer, by the ``from_pretrained`` of its class in diffusers or transformers.

    Args:
        source: The pipeline, or the network itself.
        subfolder: The part's folder in it.
        cls: The class.
        exact: Refuse all weights for which the configuration has no place, not only those of further layers.
        kwargs: Passed on.

    Raises:
        UsageError: Missing, damaged or foreign files, or weights that the architecture needs and the files lack.
    """
    where = f"{source.location}/{subfolder}" if subfolder else source.location
    if source.is_local and not Path(where).is_dir():
        raise UsageError(f"{where} is missing: {source.location} is not a complete model folder")
    if subfolder:
        kwargs["subfolder"] = subfolder
    if source.is_local and is_fp16_alone(Path(where)):
        kwargs["variant"] = "fp16"
    if issubclass(cls, nn.Module):  # not a tokenizer
        kwargs.setdefault("use_safetensors", not _only_bin(source, Path(where)))
        kwargs["output_loading_info"] = True
    try:
        loaded = cls.from_pretrained(source.location, **source.kwargs, **kwargs)
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
    # A damaged number of layers would drop the rest without a word. Fixed positions are stored in some versions only.
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.endswith("pos_embed"))
    stray = unexpected if exact else _of_further_layers(model, unexpected)
    if stray:
        raise UsageError(
            f"{where} holds {len(stray)} weights for which its config.json has no place, e.g. {stray[0]}: one of "
            "the two is damaged or of another model"
        )
    return model


def _of_further_layers(model: nn.Module, keys: Sequence[str]) -> list[str]:
    """The keys of layers behind the last one of a list of layers in the model."""
    lengths = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    # Files of transformers' older versions begin with the name of the model inside, which newer ones lack.
    inner = ("text_model.", f"{getattr(model, 'base_model_prefix', '')}.")
    lengths |= {f"{prefix}{name}": length for name, length in list(lengths.items()) for prefix in inner}
    lengths |= {name.removeprefix(prefix): length for name, length in list(lengths.items()) for prefix in inner}

    def is_further(key: str) -> bool:
        parts = key.split(".")
        return any(
            part.isdigit() and int(part) >= lengths.get(".".join(parts[:place]), math.inf)
            for place, part in enumerate(parts)
        )

    return [key for key in keys if is_further(key)]


def weight_file(source: ModelRef) -> Path | None:
    """The bare file of weights that a source names; fetched if it is on the hub. None for folders."""
    if source.file is not None:
        return Path(sources.hub_file(source, source.file))
    if source.is_local and Path(source.location).is_file():
        return Path(source.location)
    return None


def read_state_dict(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a bare file, memory-mapped where the format allows it.

    Args:
        path: The file.
        name: How the user named it: its suffix says the format (a hub cache's own files have none).

    Raises:
        UsageError: Damaged, not a file of weights, a LoRA, or a single-file checkpoint of a whole pipeline.
    """
    try:
        if name.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            # Files of the format before torch 1.6 are no zip archives and cannot be mapped.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:
        raise UsageError(f"{path} is damaged or not a file of weights: {first_line(error)}") from None
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UsageError(f"{path} holds no state dict: names with one tensor each are needed")
    refuse_foreign(path, list(state))
    return dict(state)


def tensor_shapes(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes in a bare file of weights, without reading the weights."""
    if name.endswith(".safetensors"):
        from safetensors import safe_open

        try:
            with safe_open(path, framework="pt") as weights:
                shapes = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
        except Exception as error:
            raise UsageError(f"{path} is damaged or not a file of weights: {first_line(error)}") from None
        refuse_foreign(path, list(shapes))
        return shapes
    return {key: tuple(tensor.shape) for key, tensor in read_state_dict(path, name).items()}


def refuse_foreign(path: Path, names: list[str]) -> None:
    """Refuse adapters and single-file checkpoints, with what to do about them.

    Raises:
        UsageError: The names are those of a LoRA, or of a whole pipeline in one file.
    """
    if any("lora" in name.lower() for name in names):
        raise UsageError(
            f"{path} holds a LoRA, not a network: fuse it into its base first "
            "(pipe.load_lora_weights(...); pipe.fuse_lora(); pipe.save_pretrained(...))"
        )
    if any(name.startswith(("model.diffusion_model.", "cond_stage_model.", "conditioner.")) for name in names):
        raise UsageError(
            f"{path} is a single-file checkpoint: convert it to a folder first "
            "(diffusers' from_single_file(...).save_pretrained(...))"
        )


def fill_network(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """Put a state dict into a network on the meta device; every name and shape must match.

    Raises:
        UsageError: The file is of another network.
    """
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{path} does not fit the reference's network: {reason}") from None
    return network


def damaged_weights(folder: Path) -> str | None:
    """Which safetensors file of a folder cannot be read or is absent, as a phrase; None when all are whole."""
    from safetensors import SafetensorError, safe_open

    for index in sorted(folder.glob("*.safetensors.index*.json")):
        try:
            shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            absent = sorted(shard for shard in shards if not (folder / shard).is_file())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return f"{index.name} is damaged"
        if absent:
            return f"{absent[0]} is missing ({index.name} names it)"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                weights.keys()
        except (SafetensorError, OSError) as error:
            return f"{file.name} is damaged or cut short ({first_line(error)})"
    return None


def are_in(folder: Path) -> bool:
    """Whether a folder holds a network's weights."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _only_bin(source: ModelRef, folder: Path) -> bool:
    """Whether a local folder's weights are pickles alone (read with ``weights_only``, as both libraries do)."""
    return source.is_local and not list(folder.glob("*.safetensors*")) and bool(list(folder.glob("*.bin")))
