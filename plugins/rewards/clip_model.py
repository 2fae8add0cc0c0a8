"""A CLIP model with differentiable preprocessing: the part that PickScore, CLIP, HPSv2 and Aesthetic share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_t2i import plugins
from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.families import clip, sources
from rlhf_t2i.families.sources import ModelRef
from rlhf_t2i.plugins.precision import at_least_float32
from rlhf_t2i.plugins.preprocessing import Preprocess
from rlhf_t2i.utils.device import send
from rlhf_t2i.utils.quiet import quietly

_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt")


class ClipScorer(nn.Module):
    """A transformers CLIPModel, its tokenizer and its preprocessing.

    Args:
        model: The CLIPModel.
        tokenizer: Of the same vocabulary.
        preprocess: From images in [0, 1] to the model's pixels.
    """

    def __init__(self, model: Any, tokenizer: Any, preprocess: Preprocess) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.preprocess = preprocess

    def image_features(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D] of images [B, 3, H, W] in [0, 1]; gradients flow."""
        pixels = self.preprocess(images).to(self.model.visual_projection.weight.dtype)
        return unit_rows(self.model.get_image_features(pixel_values=pixels).pooler_output)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [B, D] of prompts, cut to the model's context (77 tokens for published models)."""
        tokens = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        device = self.model.text_projection.weight.device
        mask = causal_mask(tokens.attention_mask)
        features = self.model.get_text_features(
            input_ids=send(tokens.input_ids, device), attention_mask=None if mask is None else send(mask, device)
        )
        return unit_rows(features.pooler_output)

    def logit_scale(self) -> Tensor:
        """The learned inverse temperature (about 100 in published models)."""
        return self.model.logit_scale.exp()


class ImageTower(nn.Module):
    """What a CLIP reward runs on images, for its footprint: preprocessing, image tower and head.

    Args:
        model: A CLIPModel without weights.
        head: From features to a number; none when None.
    """

    def __init__(self, model: Any, head: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        size = model.config.vision_config.image_size
        self.scorer = ClipScorer(model, None, Preprocess.square(size))
        self.head = nn.Identity() if head is None else head(model.config.projection_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Features, or the head's numbers, of images [B, 3, H, W] in [0, 1]."""
        return self.head(self.scorer.image_features(images))


def causal_mask(attention_mask: Tensor) -> Tensor | None:
    """What transformers makes of a mask [B, L] of real tokens, but on the CPU: it would read the mask on the device.

    Returns:
        Which tokens each one attends to [B, 1, L, L], bool; None where no token is padding, as in transformers.
    """
    if bool(attention_mask.all()):
        return None
    length = attention_mask.shape[1]
    return attention_mask.bool()[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()


def clip_footprint(model: str, head: Callable[[int], nn.Module] | None = None) -> plugins.Footprint | None:
    """The footprint of a CLIPModel by its config.json; None where the hub does not give it.

    Args:
        model: Hub id or local folder.
        head: As in :class:`ImageTower`.

    Raises:
        UsageError: A local folder without a readable config.json.
    """
    source = sources.parse(model)
    config = find_config(source)
    if config is None:
        return None

    def build() -> nn.Module:
        from transformers import CLIPConfig, CLIPModel

        return ImageTower(CLIPModel(CLIPConfig(**config)), head)

    return plugins.Footprint(f"{source.location}@{source.revision}", build)


def find_config(source: ModelRef) -> dict[str, Any] | None:
    """A model's config.json; None where the hub does not give it.

    Raises:
        UsageError: A local folder without a readable config.json.
    """
    try:
        return sources.read_json(source, "config.json")
    except UsageError:
        if source.is_local:
            raise
        return None


def unit_rows(features: Tensor) -> Tensor:
    """Rows of length 1, in float32 or better."""
    features = at_least_float32(features)
    return features / features.norm(dim=-1, keepdim=True)


def load_clip(model: str, processor: str | None = None, fallback: str | None = None) -> ClipScorer:
    """Load a CLIPModel with its processor; two rewards on one model share its weights.

    Args:
        model: Hub id or local folder in transformers' layout.
        processor: Where tokenizer and image processor are; the model's own folder or repository when None.
        fallback: The processor of a model that is published without one.

    Raises:
        UsageError: Missing, damaged or foreign files; weights that the architecture needs and the file lacks.
    """
    check_clip(model, processor, fallback)
    source, where = _places(model, processor, fallback)
    network = plugins.shared(_clip_network, source)
    preprocess = clip.read_preprocess(where)
    clip.check_size(preprocess, where, network.config.vision_config.image_size)
    return ClipScorer(network, load_tokenizer(where, network.config.text_config.vocab_size), preprocess)


def check_clip(model: str, processor: str | None = None, fallback: str | None = None) -> None:
    """Refuse by its files what :func:`load_clip` would; of a hub model only files in the hub's cache are read.

    Raises:
        UsageError: As of :func:`load_clip`, but for what only the weights tell.
    """
    source, where = _places(model, processor, fallback)
    if where.is_local and not has_tokenizer(where):
        raise _no_tokenizer(where)
    clip.check(source, where)


def _places(model: str, processor: str | None, fallback: str | None) -> tuple[ModelRef, ModelRef]:
    """Where a CLIPModel is, and its tokenizer and image processor."""
    source = sources.parse(model)
    if processor is not None:
        return source, sources.parse(processor)
    # What a hub repository lacks is asked of the hub when it is loaded; its cache answers at once.
    return source, source if fallback is None or has_processor(source) else sources.parse(fallback)


def _no_tokenizer(source: ModelRef) -> UsageError:
    return UsageError(f"{source.location} holds no tokenizer: one of {', '.join(_TOKENIZERS)} is needed")


def _clip_network(source: ModelRef) -> Any:
    from transformers import CLIPModel

    return load_weights(CLIPModel, source)


def has_processor(source: ModelRef) -> bool:
    """Whether a folder or hub repository holds an image processor and a tokenizer."""
    return _has_one(source, clip.PROCESSORS) and has_tokenizer(source)


def has_tokenizer(source: ModelRef) -> bool:
    """Whether a folder or hub repository holds a tokenizer of CLIP or BERT."""
    return _has_one(source, _TOKENIZERS)


def _has_one(source: ModelRef, names: Sequence[str]) -> bool:
    """Whether one of the files is in a folder, in the hub's cache, or, if the hub answers, on the hub."""
    if source.is_local:
        return any((Path(source.location) / name).is_file() for name in names)
    from huggingface_hub import constants, file_exists, try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(source.location, n, revision=source.revision), str) for n in names):
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        return any(file_exists(source.location, name, revision=source.revision) for name in names)
    except Exception:  # no network, no such repository: loading it fails with its own sentence
        return False


def load_weights(cls: Any, source: ModelRef, dtype: torch.dtype | str = torch.float32) -> Any:
    """``cls.from_pretrained``; a weight that the file lacks is an error, not a random number.

    Args:
        cls: The model's class.
        source: Its folder or repository.
        dtype: Of the weights; ``auto`` takes the file's, which halves the memory of a model published in bf16.

    Raises:
        UsageError: The files are missing, damaged or of another architecture.
    """
    if not source.is_local or (Path(source.location) / "config.json").is_file():
        sources.read_json(source, "config.json")  # refuses sizes that would be built for ever
    try:
        with quietly():
            network, info = cls.from_pretrained(source.location, dtype=dtype, output_loading_info=True, **source.kwargs)
    except Exception as error:
        raise UsageError(f"{source.location} is not a readable {cls.__name__}: {first_line(error)}") from error
    # Old checkpoints carry position_ids as a buffer; those are computed now.
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    if missing or info["mismatched_keys"]:
        wrong = missing or sorted(str(key[0]) for key in info["mismatched_keys"])
        raise UsageError(
            f"{source.location} is not a {cls.__name__}: {len(wrong)} weights are missing, e.g. {wrong[0]}"
        )
    return network


def load_tokenizer(source: ModelRef, vocabulary: int) -> Any:
    """A tokenizer, refused when it has almost no tokens or more than the model knows.

    Raises:
        UsageError: No tokenizer there. transformers itself builds one of 2 to 5 tokens and says nothing.
    """
    from transformers import AutoTokenizer

    if source.is_local and not has_tokenizer(source):
        raise _no_tokenizer(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False, **source.kwargs)
    except Exception as error:
        raise UsageError(f"the tokenizer of {source.location} cannot be read: {first_line(error)}") from error
    if not 16 <= len(tokenizer) <= vocabulary:
        raise UsageError(
            f"the tokenizer of {source.location} has {len(tokenizer)} tokens but the model knows {vocabulary}: "
            "its files are missing or belong to another model"
        )
    return tokenizer
