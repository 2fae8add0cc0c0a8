"""What a reward around a transformers model looks like: ``rlhf-t2i rewards new --model``."""

from __future__ import annotations

import re
from types import ModuleType

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import clip, sources
from rlhf_t2i.plugins.scaffold import Scaffold
from rlhf_t2i.recipe.mistakes import hint
from rlhf_t2i.training.model_card import stated_license

_PLAIN = re.compile(r"[^\x00-\x1f\"\\$]+")
"""What may stand in a Python string of the package that is written."""


def scaffold_of(model: str, label: str | None = None) -> Scaffold:
    """The scaffold of a reward around a model, from its configuration; no weights are read.

    Args:
        model: Hub id or local folder of a model with image and text features (CLIP, SigLIP, ...), or of an image
            classifier (ViT, DINOv2, ...).
        label: The class of a classifier whose log-odds are the score; the first one when None.

    Raises:
        UsageError: Neither kind, an image processor that no torch operations here do, or an unknown label.
    """
    source = sources.parse(model)
    if source.is_local:
        model = source.location  # absolute: the package may be used from anywhere
    config = sources.read_json(source, "config.json")
    clip.read_preprocess(source)
    words = {"model": _plain(model, "the model's name"), "license": _plain(stated_license(source) or "not stated", "")}
    classifier = next((n for n in config.get("architectures") or () if n.endswith("ForImageClassification")), None)
    if classifier is not None and hasattr(_transformers(), classifier):
        chosen = _label(config, label)
        return Scaffold("classifier", {**words, "hf_class": classifier, "label": chosen}, f'label: "{chosen}"')
    if label is not None:
        raise UsageError(f"--label is for an image classifier, and {model} is none")
    kind = str(config.get("model_type"))
    pair = _pair_class(kind)
    if pair is None or not {"text_config", "vision_config"} <= set(config):
        raise UsageError(
            f"{model} is a {kind!r} model without features of images and text, and no image classifier: "
            "start from `rlhf-t2i rewards new` without --model, or use the reward vlm_choice"
        )
    # SigLIP was trained on prompts padded to its whole context, without a mask.
    inputs = '("input_ids",)' if kind.startswith("siglip") else '("input_ids", "attention_mask")'
    return Scaffold("pair", {**words, "hf_class": pair, "inputs": inputs}, f'model: "{words["model"]}"')


def _label(config: sources.Config, label: str | None) -> str:
    labels = [str(name) for name in (config.get("id2label") or {"0": "LABEL_0"}).values()]
    if label is not None and label not in labels:
        raise UsageError(f"--label {label!r} is no class of the model; {hint(label, labels)}")
    return _plain(label or labels[0], "the class's name")


def _pair_class(kind: str) -> str | None:
    """The class in transformers with features of images and text, by ``model_type``."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    name = MODEL_MAPPING_NAMES.get(kind)
    found = getattr(_transformers(), name, None) if isinstance(name, str) else None
    both = hasattr(found, "get_image_features") and hasattr(found, "get_text_features")
    return str(name) if both else None


def _transformers() -> ModuleType:
    import transformers

    return transformers


def _plain(text: str, what: str) -> str:
    """The text, if it can stand in the package's Python as it is."""
    if not _PLAIN.fullmatch(text):
        raise UsageError(f"{what} {sources.printable(text)} holds quotes, backslashes, dollars or control characters")
    return text
