"""CLIP models and image processors by their configuration files: mistakes are found before weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.families import sources
from rlhf_t2i.families.sources import ModelRef
from rlhf_t2i.plugins.preprocessing import Preprocess

CONFIG = "config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Files that describe an image processor; the first that is there counts."""


def check(model: ModelRef, processor: ModelRef | None = None) -> None:
    """Refuse a model that is no CLIPModel, or an image processor that makes other images than it takes.

    Of a hub model only files in the hub's cache are read.

    Args:
        model: In transformers' layout.
        processor: Where its image processor is; the model's own place when None.

    Raises:
        UsageError: One sentence naming the file.
    """
    size = _image_size(model)
    where = processor or model
    if size is not None and (where.is_local or any(sources.cached(where, name) for name in PROCESSORS)):
        check_size(read_preprocess(where), where, size)


def check_size(preprocess: Preprocess, processor: ModelRef, size: int) -> None:
    """Refuse preprocessing whose images are not the model's.

    Args:
        preprocess: Of an image processor.
        processor: Where that is.
        size: Pixels of the model's square input.

    Raises:
        UsageError: Names both sizes.
    """
    made = preprocess.crop or (preprocess.resize if isinstance(preprocess.resize, tuple) else None)
    if made is not None and made != (size, size):
        raise UsageError(
            f"{processor.location}: its image processor makes {made[0]} x {made[1]} pixels, but the model takes "
            f"{size} x {size}: it belongs to another model"
        )


def read_preprocess(source: ModelRef) -> Preprocess:
    """The preprocessing that a model's image processor describes.

    Raises:
        UsageError: No image processor there, or one that does what this project does not.
    """
    for file in PROCESSORS:
        if source.is_local and not (Path(source.location) / file).is_file():
            continue
        try:
            return Preprocess.from_config(sources.read_json(source, file))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{source.location}/{file}: {error}") from error
        except UsageError:
            if source.is_local or file == PROCESSORS[-1]:
                raise
    raise UsageError(f"{source.location} holds no image processor: {' or '.join(PROCESSORS)} is needed")


def _image_size(source: ModelRef) -> int | None:
    """Pixels of a CLIPModel's square input; None where its configuration is not here."""
    if not source.is_local and sources.cached(source, CONFIG) is None:
        return None
    from transformers import CLIPConfig

    config = sources.read_json(source, CONFIG)
    kind = config.get("model_type")
    if kind != CLIPConfig.model_type:
        raise UsageError(
            f"{source.location} is no CLIPModel: its {CONFIG} has the model_type {sources.printable(kind)}"
        )
    return _parsed(config, source)


def _parsed(config: dict[str, Any], source: ModelRef) -> int:
    from transformers import CLIPConfig

    try:
        return int(CLIPConfig(**config).vision_config.image_size)
    except Exception as error:  # transformers' own, of a damaged or foreign file
        raise UsageError(f"{source.location}/{CONFIG} is damaged: {first_line(error)}") from None
