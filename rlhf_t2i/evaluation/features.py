"""The features in which images are compared: a CLIP's, the model's own decoder's, or Inception's."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rlhf_t2i.errors import UsageError, first_line, option
from rlhf_t2i.evaluation import identity
from rlhf_t2i.evaluation.results import Metric
from rlhf_t2i.families import clip as clip_files
from rlhf_t2i.families import sources
from rlhf_t2i.families.base import Decoder
from rlhf_t2i.utils import files, fingerprints, inputs, stats

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True)
class Extractor:
    """Features of images.

    Attributes:
        name: Printed beside every number made from them.
        identity: A digest of the network, for the folder in which features are kept.
        extract: Images [B, 3, H, W] in [0, 1] to features [B, D].
    """

    name: str
    identity: str
    extract: Callable[[Tensor], Tensor]


def check(location: str) -> None:
    """Refuse by its files what :class:`ClipFeatures` would, before anything is drawn.

    Raises:
        UsageError: No CLIPModel, or an image processor of another model.
    """
    try:
        clip_files.check(sources.parse(location))
    except UsageError as error:
        raise UsageError(f"{option('features')}: {error}") from None


class ClipFeatures:
    """The projected image features of a transformers CLIPModel, and its zero-shot classes.

    Args:
        location: Folder or hub id.
        device: Where it runs.

    Raises:
        UsageError: It cannot be loaded.
    """

    def __init__(self, location: str, device: torch.device) -> None:
        from transformers import CLIPModel

        source = sources.parse(location)
        self.location, self.device = location, device
        try:
            self.model = CLIPModel.from_pretrained(source.location, **source.kwargs).eval().to(device)
            self.preprocess = clip_files.read_preprocess(source)
            clip_files.check_size(self.preprocess, source, self.model.config.vision_config.image_size)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"{option('features')}: {location} cannot be loaded ({first_line(error)}); give a CLIP folder, "
                "a hub id, or 'vae'"
            ) from error

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, D], not normalized."""
        pixels = self.preprocess(images.to(self.device))
        return self.model.get_image_features(pixel_values=pixels).pooler_output.float().cpu()

    @torch.no_grad()
    def label_probe(self, labels: list[str]) -> Probe:
        """A probe that chooses among sentences: softmax of the logits against each (Radford et al. 2021)."""
        from transformers import AutoTokenizer

        source = sources.parse(self.location)
        tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False, **source.kwargs)
        if len(tokenizer) < 16:
            raise UsageError(
                f"{option('features')}: {self.location} holds no tokenizer, so {option('classes')} needs a probe's file"
            )
        tokens = tokenizer(labels, padding=True, truncation=True, return_tensors="pt").to(self.device)
        text = self.model.get_text_features(**tokens).pooler_output.float()
        text = text / text.norm(dim=-1, keepdim=True)
        weight = (text * self.model.logit_scale.exp()).cpu().double().numpy()
        return Probe(labels, weight, np.zeros(len(labels)))


class _ProbeFile(BaseModel):
    """What a probe's file holds; keys besides are notes."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    labels: list[str]
    weight: list[list[float]]
    bias: list[float]
    hard: bool = False


@dataclass(frozen=True)
class Probe:
    """A linear classifier on features of length 1.

    Args:
        labels: C names.
        weight: [C, D].
        bias: [C].
        hard: Count the likeliest class alone: for a probe whose outputs are not log-probabilities (least squares).
    """

    labels: list[str]
    weight: np.ndarray
    bias: np.ndarray
    hard: bool = False

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Class probabilities [N, C] of features [N, D]."""
        features = np.asarray(features, dtype=np.float64)
        unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        logits = unit @ self.weight.T + self.bias
        if self.hard:
            return np.eye(len(self.labels))[logits.argmax(axis=1)]
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponents / exponents.sum(axis=1, keepdims=True)

    @classmethod
    def read(cls, path: Path) -> Probe:
        """Read ``{"labels": [C], "weight": [C][D], "bias": [C], "hard": false}``.

        Raises:
            UsageError: Missing or damaged.
        """
        data = inputs.read_json(path, "probe", place=f"{option('classes')}: ")
        try:
            probe = _ProbeFile.model_validate(data)
            weight, bias = np.array(probe.weight), np.array(probe.bias)
        except ValueError:  # pydantic's is one; another one for rows of several lengths
            raise UsageError(
                f"{option('classes')}: {path} is no probe: a JSON object with labels, weight and bias"
            ) from None
        if weight.ndim != 2 or not len(probe.labels) == len(weight) == len(bias) >= 2:
            raise UsageError(f"{option('classes')}: {path}: labels, weight and bias do not fit together")
        return cls(probe.labels, weight, bias, probe.hard)


def clip_extractor(clip: ClipFeatures) -> Extractor:
    """Features of a CLIP, for distances and Frechet distance; a local folder is named by its last two parts."""
    local = Path(clip.location).is_dir()
    name = "/".join(Path(clip.location).resolve().parts[-2:]) if local else clip.location
    return Extractor(f"CLIP {name}", _identity(clip.location), clip)


def vae_extractor(decoder: Decoder, model: str, device: torch.device) -> Extractor:
    """The mean latents of the model's own VAE, flattened: always there, and blind to meaning."""

    def extract(images: Tensor) -> Tensor:
        return decoder.encode(images.to(device)).flatten(1).cpu()

    return Extractor("the model's VAE latents", f"vae-{_identity(model)}", extract)


def inception_extractor(weights: str | None, device: torch.device) -> Extractor:
    """The 2048 pooled features of FID's InceptionV3, by torchmetrics and torch-fidelity.

    Raises:
        UsageError: The package or its weights are missing.
    """
    path = files.expanded(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        raise UsageError(
            f"{option('metrics')} fid: no Inception weights at {path}: give {INCEPTION_FILE} of torch-fidelity "
            f"with {option('inception')}, "
            "or measure frechet_clip instead"
        )
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path)).to(device)
    except ImportError as error:
        needs = "needs torchmetrics and torch-fidelity (the extra fid: docs/install.md)"
        raise UsageError(f"{option('metrics')} fid {needs}: {error}") from None
    except Exception as error:
        raise UsageError(f"{option('inception')}: {path} cannot be loaded: {first_line(error)}") from None

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        return network((images * 255).round().to(torch.uint8).to(device)).float().cpu()

    return Extractor("InceptionV3 pool3 (torch-fidelity)", fingerprints.of_path(str(path)), extract)


def class_entropy(probe: Probe, features: np.ndarray, units: Sequence[Hashable], name: str) -> list[Metric]:
    """Entropy of the classes among a prompt's images, and over all images with the share of each class.

    Args:
        probe: The classifier.
        features: [N, D].
        units: The prompt of each image.
        name: Of the features.
    """
    probabilities = probe.probabilities(features)
    columns = [stats.by_unit(column, units) for column in probabilities.T]
    values = [stats.entropy(row) for row in np.stack(columns, axis=1)]
    unit = f"nats {{}}, at most ln {len(probe.labels)} = {math.log(len(probe.labels)):.3f}, {name}"
    overall = probabilities.mean(0)
    shares = dict(zip(probe.labels, overall.tolist(), strict=True))
    return [
        Metric.of_prompts("class_entropy", values, unit.format("within a prompt"), shares),
        Metric("class_entropy_overall", "set", unit.format("over all images"), value=stats.entropy(overall)),
    ]  # fmt: skip


def _identity(model: str) -> str:
    """A digest of a model's content, fit for the name of a folder."""
    return fingerprints.of_text(identity.of_model(model))
