"""The evaluation itself: draw, score, compare, write. Every batch is finished work as soon as it stands on the disk."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_t2i import plugins
from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.evaluation import benchmarks, features, journal, results
from rlhf_t2i.evaluation.features import ClipFeatures, Extractor, Probe
from rlhf_t2i.evaluation.images import picture_files, png, read_images
from rlhf_t2i.evaluation.progress import ProgressCallback
from rlhf_t2i.evaluation.results import Measured, Results
from rlhf_t2i.evaluation.sampler import Sampler, Sampling, resolve
from rlhf_t2i.evaluation.settings import SPECIAL, Settings, check
from rlhf_t2i.plugins import registry
from rlhf_t2i.utils import files, fingerprints
from rlhf_t2i.utils.device import default_device
from rlhf_t2i.utils.quiet import quietly
from rlhf_t2i.utils.stats import frechet_distance

FRECHET_PIXELS = 256


def evaluate(settings: Settings, out: Path, progress: ProgressCallback | None = None) -> Results:
    """Measure a model; run again after a kill it goes on, and gives byte for byte the same tables.

    Args:
        settings: What to measure.
        out: Gets ``images/00000.png`` ..., ``results.json``, ``table.md``, ``table.csv`` and ``cost.json``.
        progress: Called after every batch.

    Raises:
        UsageError: Bad settings, or ``out`` holds another evaluation.
    """
    check(settings)
    start = time.monotonic()
    with quietly():
        work = Work(settings, out, progress or (lambda what, done, total: None))  # refuses before OUT is made
    with files.exclusive(out, "evaluation"), quietly():
        work.draw()
        measured = work.measure()
        _add_cost(out, time.monotonic() - start, len(work.indices), str(work.device))
        return results.write(out, settings, work.sampling, work.prompts, measured)


@dataclass
class Work:
    """One evaluation under way."""

    settings: Settings
    out: Path
    progress: ProgressCallback

    def __post_init__(self) -> None:
        self.device = default_device()
        found = benchmarks.load(self.settings.prompts, self.settings.column).first(self.settings.limit)
        self.prompts = found
        self.sampling: Sampling = resolve(self.settings)
        count = self.settings.images_per_prompt
        self.indices = list(range(len(found.prompts) * count))
        self.image_prompts = [prompt for prompt in found.prompts for _ in range(count)]
        prompt_digest = hashlib.sha256("\n".join(found.prompts).encode()).hexdigest()
        identity = self.settings.image_settings | {
            "prompts_sha256": prompt_digest,
            "weights": [fingerprints.of_path(path) for path in (self.sampling.model, self.sampling.base)],
        }
        # Paths may differ between two machines or working directories; what they hold is in the digests.
        for name in ("model", "base", "prompts"):
            identity.pop(name)
        journal.claim(self.out, "images.json", identity)
        self.journal = journal.Journal(self.out / "scores.jsonl")

    @property
    def batches(self) -> Iterator[tuple[int, list[int]]]:
        """(number, image indices): always the same batches, so that a resumed one repeats its numbers exactly."""
        size = self.settings.batch_size
        for number, first in enumerate(range(0, len(self.indices), size)):
            yield number, self.indices[first : first + size]

    def draw(self) -> None:
        """Write the images that are missing."""
        folder = self.out / "images"
        folder.mkdir(exist_ok=True)
        sampler: Sampler | None = None
        for _, batch in self.batches:
            if not all(self._path(index).is_file() for index in batch):
                sampler = sampler or Sampler(self.sampling, self.settings.seed, self.device, self.settings.precision)
                images = sampler.images(batch, [self.image_prompts[index] for index in batch])
                for index, image in zip(batch, images, strict=True):
                    if not self._path(index).is_file():
                        files.write_atomic(self._path(index), png(image))
            self.progress("drawing", batch[-1] + 1, len(self.indices))

    def measure(self) -> list[Measured]:
        """Every metric, in the order it was asked for."""
        measured: list[Measured] = []
        with plugins.sharing():
            for label, name in self.settings.named.items():
                measured += _SPECIAL[name](self) if name in SPECIAL else [self._reward(label, name)]
        return measured

    def _reward(self, label: str, name: str) -> Measured:
        options = self.settings.options.get(label, {})
        key = f"{name} {fingerprints.of_options(options)}"
        cls = registry.load_class(registry.REWARDS, name)
        loaded: list[Any] = []

        def score(images: Tensor, prompts: Sequence[str]) -> list[float | None]:
            if not loaded:
                loaded.append(registry.reward(name, **options).eval().to(self.device))
            with torch.no_grad():
                values = loaded[0].score(images.to(self.device), prompts).float().cpu().tolist()
            if len(values) != len(prompts):
                raise RunError(f"metric {name!r} gave {len(values)} scores for {len(prompts)} images")
            return values

        values = self._over_batches(f"scoring {label}", key, score)
        if loaded:
            # An instance may know its unit better than its class (PickScore as a logit).
            self.journal.put(f"unit {key}", 0, [str(loaded[0].unit)])
        unit = (self.journal.get(f"unit {key}", 0) or [cls.unit])[0]
        return Measured.of_images(label, unit, values, self.settings.images_per_prompt, cls.higher_is_better)

    def _over_batches(
        self, what: str, key: str, score: Callable[[Tensor, list[str]], list[float | None]]
    ) -> list[float]:
        values: list[float] = []
        for number, batch in self.batches:
            found = self.journal.get(key, number)
            if found is None:
                found = score(self._images(batch), [self.image_prompts[index] for index in batch])
                self.journal.put(key, number, [None if v is None or v != v else v for v in found])
            values += [float("nan") if value is None else value for value in found]
            self.progress(what, batch[-1] + 1, len(self.indices))
        return values

    @cached_property
    def clip(self) -> ClipFeatures:
        """The CLIP that ``--features`` names."""
        return ClipFeatures(self.settings.features, self.device)

    @cached_property
    def comparison(self) -> Extractor:
        """The features in which images of one prompt are compared."""
        if self.settings.features != "vae":
            return features.clip_extractor(self.clip)
        sampler = Sampler(self.sampling, self.settings.seed, self.device, self.settings.precision)
        return features.vae_extractor(sampler.store.decoder.vae, self.sampling.base, self.device)

    def features(
        self, extractor: Extractor, batches: Sequence[list[Path]], folder: str, square: int | None
    ) -> np.ndarray:
        """Features [N, D] of picture files, kept batch by batch in OUT/features."""
        parts, total, done = [], sum(map(len, batches)), 0
        for number, paths in enumerate(batches):
            file = self.out / "features" / folder / f"{number:05d}.npy"
            if file.is_file():
                part = np.load(file)
            else:
                buffer = io.BytesIO()
                part = extractor.extract(read_images(paths, square)).double().numpy().astype(np.float32)
                np.save(buffer, part)
                files.write_atomic(file, buffer.getvalue())
            parts.append(part)
            done += len(paths)
            self.progress(f"comparing ({extractor.name})", done, total)
        return np.concatenate(parts).astype(np.float64)

    def own_features(self, extractor: Extractor, square: int | None = None) -> np.ndarray:
        """Features of this evaluation's images."""
        batches = [[self._path(index) for index in batch] for _, batch in self.batches]
        return self.features(extractor, batches, f"{extractor.identity}-{square or 'full'}", square)

    def frechet(self, key: str, extractor: Extractor) -> list[Measured]:
        """Squared Frechet distance to the folder of real images, in the extractor's features."""
        paths = picture_files(Path(str(self.settings.real)))
        size = self.settings.batch_size
        batches = [paths[i : i + size] for i in range(0, len(paths), size)]
        content = hashlib.sha256("".join(f"{p.name} {p.stat().st_size}\n" for p in paths).encode()).hexdigest()[:12]
        real = self.features(extractor, batches, f"{extractor.identity}-real-{content}", FRECHET_PIXELS)
        value = frechet_distance(self.own_features(extractor, FRECHET_PIXELS), real)
        note = (
            f"squared Frechet distance in features of {extractor.name}; {len(self.indices)} against {len(paths)} real"
        )
        return [Measured.single(key, note, value, higher_is_better=False)]

    def _path(self, index: int) -> Path:
        return self.out / "images" / f"{index:05d}.png"

    def _images(self, batch: Sequence[int]) -> Tensor:
        return read_images([self._path(index) for index in batch])


def _diversity(work: Work) -> list[Measured]:
    name, count = work.comparison.name, work.settings.images_per_prompt
    found = features.diversity(work.own_features(work.comparison), count)
    return [
        Measured.of_prompts("pairwise_distance", f"mean cosine distance within a prompt, {name}", found.distance),
        Measured.of_prompts("vendi", f"Vendi score within a prompt, 1 to {count}, {name}", found.vendi),
    ]


def _class_entropy(work: Work) -> list[Measured]:
    classes = str(work.settings.classes)
    probe = Probe.read(Path(classes)) if classes.endswith(".json") else work.clip.label_probe(classes.split("|"))
    own = work.own_features(work.comparison)
    if own.shape[1] != probe.weight.shape[1]:
        raise UsageError(
            f"--classes: the probe takes {probe.weight.shape[1]} features, --features gives {own.shape[1]}"
        )
    return results.class_entropy(probe, own, work.settings.images_per_prompt, work.comparison.name)


_SPECIAL: dict[str, Callable[[Work], list[Measured]]] = {
    "diversity": _diversity,
    "class_entropy": _class_entropy,
    "fid": lambda work: work.frechet("fid", features.inception_extractor(work.settings.inception, work.device)),
    "frechet_clip": lambda work: work.frechet("frechet_clip", features.clip_extractor(work.clip)),
}


def _add_cost(out: Path, seconds: float, images: int, device: str) -> None:
    """Seconds spent, summed over resumes; kept apart from the results, which must not depend on it."""
    path = out / "cost.json"
    try:
        before = float(json.loads(path.read_text("utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        before = 0.0
    cost = {"seconds": round(before + seconds, 3), "images": images, "device": device}
    files.write_atomic(path, journal.dumps(cost))
