"""What an image is compared by: features of a CLIP, of the model's own VAE, or of Inception."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.families import sources
from rlhf_t2i.plugins.preprocessing import Preprocess
from rlhf_t2i.utils import files, fingerprints, stats

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True)
class Extractor:
    """Features of images.

    Args:
        name: What the features are, as printed beside every number made from them.
        identity: A digest of the network, for the folder in which features are kept.
        extract: Images [B, 3, H, W] in [0, 1] to features [B, D].
    """

    name: str
    identity: str
    extract: Callable[[Tensor], Tensor]


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
            self.preprocess = Preprocess.from_config(_preprocessor(source))
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"--features: {location} cannot be loaded ({first_line(error)}); give a CLIP folder, a hub id, or 'vae'"
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
            raise UsageError(f"--features: {self.location} holds no tokenizer, so --classes needs a probe's file")
        tokens = tokenizer(labels, padding=True, truncation=True, return_tensors="pt").to(self.device)
        text = self.model.get_text_features(**tokens).pooler_output.float()
        text = text / text.norm(dim=-1, keepdim=True)
        weight = (text * self.model.logit_scale.exp()).cpu().double().numpy()
        return Probe(labels, weight, np.zeros(len(labels)))


@dataclass(frozen=True)
class Probe:
    """A linear classifier on features of length 1.

    Args:
        labels: C names.
        weight: [C, D].
        bias: [C].
        hard: Count the likeliest class alone: for a probe whose outputs are no log-probabilities (least squares).
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
        try:
            data = json.loads(path.read_text("utf-8"))
            labels = [str(label) for label in data["labels"]]
            weight, bias = np.array(data["weight"], dtype=np.float64), np.array(data["bias"], dtype=np.float64)
        except OSError as error:
            raise UsageError(f"--classes: {path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"--classes: {path} is no probe: a JSON object with labels, weight and bias") from None
        if weight.ndim != 2 or not len(labels) == len(weight) == len(bias) >= 2:
            raise UsageError(f"--classes: {path}: labels, weight and bias do not fit together")
        return cls(labels, weight, bias, bool(data.get("hard", False)))


def clip_extractor(clip: ClipFeatures) -> Extractor:
    """Features of a CLIP, for distances and Frechet distance; a local folder goes by its last two names."""
    local = Path(clip.location).is_dir()
    name = "/".join(Path(clip.location).resolve().parts[-2:]) if local else clip.location
    return Extractor(f"CLIP {name}", fingerprints.of_path(clip.location), clip)


def vae_extractor(vae: Any, model: str, device: torch.device) -> Extractor:
    """The mean latents of the model's own VAE, flattened: always there, and blind to meaning."""

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        encoded = vae.encode(images.to(device) * 2 - 1)
        latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
        return latents.float().flatten(1).cpu()

    return Extractor("the model's VAE latents", f"vae-{fingerprints.of_path(model)}", extract)


def inception_extractor(weights: str | None, device: torch.device) -> Extractor:
    """The 2048 pooled features of FID's InceptionV3, by torchmetrics and torch-fidelity.

    Raises:
        UsageError: The package or its weights are not there.
    """
    path = files.expanded(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        raise UsageError(
            f"--metrics fid: no Inception weights at {path}: give {INCEPTION_FILE} of torch-fidelity with --inception, "
            "or measure frechet_clip instead"
        )
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path)).to(device)
    except ImportError as error:
        raise UsageError(f"--metrics fid needs torchmetrics and torch-fidelity: pip install 'rlhf-t2i[fid]' ({error})"
                         ) from None  # fmt: skip
    except Exception as error:
        raise UsageError(f"--inception: {path} cannot be loaded: {first_line(error)}") from None

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        return network((images * 255).round().to(torch.uint8).to(device)).float().cpu()

    return Extractor("InceptionV3 pool3 (torch-fidelity)", fingerprints.of_path(str(path)), extract)


@dataclass(frozen=True)
class Diversity:
    """How different the images of each prompt are: [P] values each."""

    distance: list[float]
    vendi: list[float]


def diversity(features: np.ndarray, images_per_prompt: int) -> Diversity:
    """Mean pairwise cosine distance and Vendi score within each prompt, of features [P * K, D] in prompt order."""
    groups = features.reshape(-1, images_per_prompt, features.shape[-1])
    return Diversity(
        [stats.mean_pairwise_distance(group) for group in groups],
        [stats.vendi_score(group) for group in groups],
    )


def _preprocessor(source: sources.ModelRef) -> dict[str, Any]:
    try:
        return sources.read_json(source, "preprocessor_config.json")
    except UsageError:
        return sources.read_json(source, "processor_config.json")
