"""The files of the reference that an export copies: fetched before a run starts, not after days of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rlhf_t2i.errors import RunError, UsageError, first_line
from rlhf_t2i.families import sources
from rlhf_t2i.families.sources import CONFIG, INDEX, Config, ModelRef
from rlhf_t2i.utils import files

_OTHER_FORMATS = ("*.bin", "*.msgpack", "*.h5", "*.onnx*", "openvino*", "*.ckpt")
_HALVES = "*.fp16[.-]*"


def fetch(reference: ModelRef, network: str, vae: ModelRef | None) -> None:
    """Download what an export copies of hub models into the hub's cache; local folders need nothing.

    Args:
        reference: The reference.
        network: The folder of its denoising network, of which the configuration alone is needed.
        vae: The decoder that takes the reference's place.

    Raises:
        UsageError: The hub does not give it, and the cache does not hold it.
    """
    if not reference.is_local:
        parts = copied_parts(sources.pipeline_index(reference), network)
        wanted = [INDEX, "scheduler/*.json", f"{network}/config.json", *(f"{part}/*" for part in parts)]
        _download(reference, INDEX, wanted)
    if vae is not None and not vae.is_local:
        _download(vae, CONFIG, [CONFIG, "diffusion_pytorch_model*"])


def folder(source: ModelRef, sure: str) -> Path:
    """Where a model's files lie on this machine, after :func:`fetch`; asks no network.

    Args:
        source: The model.
        sure: A file that it surely has: ``model_index.json`` of a pipeline, ``config.json`` of a network by itself.
    """
    if source.is_local:
        return Path(source.location)
    found = sources.cached(source, sure)
    if found is None:
        raise RunError(f"{source.location} is gone from the hub's cache: it was there when the run started")
    return found.parent


def copied_parts(index: Config, network: str) -> list[str]:
    """The folders of a pipeline that an export copies as they are: all but its network's and its scheduler's.

    Args:
        index: Its model_index.json.
        network: The folder of its denoising network.
    """
    used = [name for name, entry in index.items() if isinstance(entry, list) and entry and entry[0] is not None]
    return [name for name in used if name not in (network, "scheduler")]


def copy_part(part: Path, target: Path) -> None:
    """Copy a pipeline's folder without its weights' other formats; an fp16 variant that stands alone is renamed.

    With plain names no ``variant=`` is needed to load it.
    """
    halves = is_fp16_alone(part)
    ignored = [*_OTHER_FORMATS, *([] if halves else [_HALVES])]
    if not any(part.glob("*.safetensors")):  # then the pickles are its only weights
        ignored = [pattern for pattern in ignored if pattern != "*.bin"]
    shutil.copytree(part, target, ignore=shutil.ignore_patterns(*ignored))
    for file in list(target.glob(_HALVES)):
        if file.suffix == ".json":  # the index of shards names them
            file.write_text(file.read_text("utf-8").replace(".fp16", ""), "utf-8")
        file.rename(target / file.name.replace(".fp16", ""))


def is_fp16_alone(folder: Path) -> bool:
    """Published folders sometimes hold ``*.fp16.safetensors`` alone."""
    names = [p.name for p in folder.glob("*.safetensors")]
    return bool(names) and all(".fp16" in name for name in names)


def _download(source: ModelRef, sure: str, wanted: list[str]) -> None:
    from huggingface_hub import snapshot_download

    ignored = [*_OTHER_FORMATS, _HALVES]
    try:
        snapshot_download(source.location, revision=source.revision, allow_patterns=wanted, ignore_patterns=ignored)
    except Exception as error:  # offline, unknown, refused: the client's HTTP library, and so the errors, differ
        if sources.cached(source, sure) is None:
            raise UsageError(f"{source.location} cannot be read from the hub: {first_line(error)}") from error


def load_in_float32(config: Path) -> None:
    """Let transformers load an encoder as diffusers loads the network: by itself it takes the stored weights' dtype.

    A caller that asks the pipeline for another dtype still gets it, everywhere.
    """
    if not config.is_file():
        return
    data = json.loads(config.read_text("utf-8"))
    if "architectures" in data:  # of transformers
        data.pop("torch_dtype", None)  # the key's name before transformers 5
        files.write_json(config, data | {"dtype": "float32"})
