"""``rlhf-t2i eval``: draw images, score the files, write results. Whatever is on the disk is never done again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from rlhf_t2i import plugins
from rlhf_t2i.errors import UsageError, option
from rlhf_t2i.evaluation import benchmarks, diversity, feature_files, features, identity, journal, models
from rlhf_t2i.evaluation.features import ClipFeatures, Extractor, Probe
from rlhf_t2i.evaluation.results import Metric, Results, dumps
from rlhf_t2i.evaluation.settings import SPECIAL, Settings, check
from rlhf_t2i.plugins import registry
from rlhf_t2i.plugins.base import LatentReward
from rlhf_t2i.plugins.comparing import one_alone
from rlhf_t2i.plugins.traits import RewardTraits
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.utils import files, fingerprints, images, jsonl, targets
from rlhf_t2i.utils.device import default_device
from rlhf_t2i.utils.inputs import JsonObject
from rlhf_t2i.utils.quiet import quietly
from rlhf_t2i.utils.stats import frechet_distance

FRECHET_PIXELS = 256
_COST = "cost.json"
Progress = Callable[[str, int, int], None]
"""Called with a phase, and how many of how many images went through it."""


def evaluate(settings: Settings, out: Path, progress: Progress = lambda phase, done, total: None) -> Results:
    """Measure a model. Run again after a kill, it continues and gives the same results.

    Args:
        settings: What to measure.
        out: Gets ``images/00000.png`` ..., ``results.json``, ``table.md``, ``table.csv`` and ``cost.json``.
        progress: Called after every batch.

    Raises:
        UsageError: Bad settings, or ``out`` holds another evaluation.
        RunError: A reward failed, an image is not finite, or the disk is full.
    """
    check(settings)
    targets.check_folder(out, option("out"))
    start = time.monotonic()
    with quietly():
        evaluation = Evaluation(settings, out, progress)
    with files.exclusive(out, "evaluation"), files.disk_errors(out), quietly():
        evaluation.claim()
        earlier = _seconds(out)
        evaluation.draw()
        measured = evaluation.measure()
        seconds = round(earlier + time.monotonic() - start, 3)
        cost = {"seconds": seconds, "images": len(evaluation.prompts), "device": str(evaluation.device)}
        files.write_atomic(out / _COST, dumps(cost))
        return evaluation.write(measured)


@dataclass
class Evaluation:
    """One evaluation under way.

    Args:
        settings: What to measure.
        out: Its folder.
        progress: Called after every batch.

    Raises:
        UsageError: A model, prompt list or reward that can be refused before anything is drawn.
    """

    settings: Settings
    out: Path
    progress: Progress
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = self.settings
        self.device = default_device()
        prompts, groups = benchmarks.load(settings.prompts, settings.column).first(settings.limit)
        count = settings.images_per_prompt
        self.prompts = [prompt for prompt in prompts for _ in range(count)]
        self.groups = [group for group in groups for _ in range(count)]
        self.drawing = models.resolved(settings.drawing)
        self.model = models.load(self.drawing, self.device, settings.precision)
        self.versions = identity.versions()
        self.real = images.find(Path(settings.real)) if settings.real else []
        if settings.real and len(self.real) < 2:
            raise UsageError(
                f"{option('real')}: {settings.real} holds {len(self.real)} images: at least two are needed"
            )
        if settings.features != "vae" and {"diversity", "class_entropy", "frechet_clip"} & {*settings.named.values()}:
            features.check(settings.features)
        self._rewards = {label: self._reward_key(label, name) for label, name in settings.named.items()
                         if name not in SPECIAL}  # fmt: skip

    def claim(self) -> None:
        """Refuse a folder whose images are of other content; say where package versions have changed since."""
        settings = self.settings
        height, width = self.model.store.size
        self.drawn = self.drawing.model_dump() | {
            "height": height, "width": width,
            "model": identity.of_model(self.drawing.model), "base": identity.of_model(str(self.drawing.base)),
            "vae": None if self.drawing.vae is None else identity.of_model(self.drawing.vae),
            "seed": settings.seed, "precision": settings.precision, "images_per_prompt": settings.images_per_prompt,
            "prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest(),
        }  # fmt: skip
        self._tell_versions("the images", journal.claim(self.out, "images.json", self.drawn, self.versions))
        self.images = journal.DrawnImages(self.out / "drawn.jsonl")
        self.scores = journal.Scores(self.out / "scores.jsonl")

    def draw(self) -> None:
        """Write the images that are missing, or are not as they were drawn."""
        (self.out / "images").mkdir(exist_ok=True)
        missing = [index for index in range(len(self.prompts)) if not self._is_drawn(index)]
        done = len(self.prompts) - len(missing)
        for batch in self._batches(missing):
            keys = [(self.settings.seed, "evaluation", index) for index in batch]
            drawn = self.model.images([self.prompts[index] for index in batch], keys)
            pictures = [images.png(image) for image in drawn]
            for index, picture in zip(batch, pictures, strict=True):
                files.write_atomic(self._path(index), picture)
            self.images.add(batch, [hashlib.sha256(picture).hexdigest() for picture in pictures])
            done += len(batch)
            self.progress("drawing", done, len(self.prompts))

    def _is_drawn(self, index: int) -> bool:
        """Whether an image is there, bit for bit as it was drawn."""
        digest, path = self.images.digest(index), self._path(index)
        return digest is not None and path.is_file() and files.sha256(path) == digest

    @property
    def digests(self) -> list[str]:
        """Of the images, which are all drawn."""
        return [self.images.digest(index) or "" for index in range(len(self.prompts))]

    def measure(self) -> list[Metric]:
        """Every metric, in the order it was asked for."""
        measured: list[Metric] = []
        with plugins.sharing():
            for label, name in self.settings.named.items():
                measured += _SPECIAL[name](self) if name in SPECIAL else [self._reward(label, name)]
        return measured

    def write(self, measured: Sequence[Metric]) -> Results:
        """Write results.json and the tables."""
        facts = {"drawing": self.drawn, "versions": self.versions}
        names = [f"images/{index:05d}.png" for index in range(len(self.prompts))]
        groups = self.groups if any(self.groups) else []
        results = Results(
            self.prompts, {m.key: m for m in measured}, groups, names, facts=facts, notes=self.notes, folder=self.out
        )
        results.write()
        results.write_tables(
            f"{len(self.prompts)} images of {len(results.members)} prompts, seed {self.settings.seed}, "
            f"{self.model.description}. Intervals: 95% percentile bootstrap over prompts."
        )
        return results

    def _reward_key(self, label: str, name: str) -> str:
        """The name under which a reward's scores are recorded: it changes with code, options and weights."""
        given = self.settings.options.get(label, {})
        self._check_reward(label, name, given)
        return f"{name} {identity.of_plugin(registry.REWARDS, name, given)}"

    def _check_reward(self, label: str, name: str, given: JsonObject) -> None:
        """Refuse a reward that cannot score these images, or not in these batches."""
        settings, cls = self.settings, registry.load_class(registry.REWARDS, name)
        if issubclass(cls, LatentReward):
            raise UsageError(
                f"{option('metrics')} {label}: {name!r} scores latents beside a trained generator, not images"
            )
        options = registry.parse_options(cls, f"metric {label!r}", given)
        reward = RewardTraits(label, name, trains=False, unit="", options=options, plugin=cls)
        if reward.compares and one_alone(len(self.prompts), settings.images_per_prompt, [settings.batch_size]):
            raise UsageError(
                f"{option('metrics')} {label}: {name!r} compares the images of a prompt, and some call would hold one "
                f"alone: give {option('images-per-prompt')} 2 or more, and a multiple of it as {option('batch-size')}"
            )
        if (reason := reward.refuse_prompts(dict.fromkeys(self.prompts))) is not None:
            raise UsageError(f"{option('prompts')}: {label} cannot score them: {reason}")

    def _reward(self, label: str, name: str) -> Metric:
        key, options = self._rewards[label], self.settings.options.get(label, {})
        digests = self.digests
        values = self.scores.values(key, digests)
        if values:
            self._tell_versions(f"scores of {label}", self.scores.versions(key))
        missing = [index for index in range(len(self.prompts)) if index not in values]
        role: RewardRole | None = None
        for batch in self._batches(missing):
            if role is None:
                reward = registry.reward(name, **options)
                role = RewardRole({label: reward}, None, device=self.device, failures_dir=self.out / "failures")
            prompts = [self.prompts[index] for index in batch]
            scores = role.score_images(images.read([self._path(index) for index in batch]), prompts)[label].tolist()
            self.scores.add(key, batch, [digests[index] for index in batch], scores, self.versions)
            values |= zip(batch, scores, strict=True)
            self.progress(f"scoring {label}", len(values), len(self.prompts))
        cls = registry.load_class(registry.REWARDS, name)
        unit = cls.unit_of(registry.parse_options(cls, f"metric {label!r}", options))
        scores = [values[index] for index in range(len(self.prompts))]
        return Metric.of_images(label, scores, self.units, unit=unit, higher_is_better=cls.higher_is_better)

    @property
    def units(self) -> list[tuple[str, str]]:
        """What each image counts for; the same prompt in two groups counts twice."""
        return list(zip(self.groups, self.prompts, strict=True))

    @cached_property
    def clip(self) -> ClipFeatures:
        """The CLIP that ``--features`` names."""
        return ClipFeatures(self.settings.features, self.device)

    @cached_property
    def extractor(self) -> Extractor:
        """The features in which images of one prompt are compared."""
        if self.settings.features != "vae":
            return features.clip_extractor(self.clip)
        return features.vae_extractor(self.model.store.decoder, str(self.drawing.base), self.device)

    def features(
        self, extractor: Extractor, paths: Sequence[Path], digests: Sequence[str], folder: str, square: int | None
    ) -> np.ndarray:
        """Features [N, D] of image files with these digests, kept batch by batch in OUT/features."""
        parts = []
        for batch in self._batches(range(len(paths))):
            file = self.out / "features" / folder / f"{batch[0]:05d}-{len(batch)}.npy"
            pictured = [digests[index] for index in batch]
            part = feature_files.load(file, pictured)
            if part is None:
                part = extractor.extract(images.read([paths[index] for index in batch], square)).float().numpy()
                feature_files.save(file, part, pictured)
            parts.append(part)
            self.progress(f"comparing ({extractor.name})", batch[-1] + 1, len(paths))
        return np.concatenate(parts).astype(np.float64)

    def own_features(self, extractor: Extractor, square: int | None = None) -> np.ndarray:
        """Features of this evaluation's images."""
        paths = [self._path(index) for index in range(len(self.prompts))]
        return self.features(extractor, paths, self.digests, f"{extractor.identity}-{square or 'full'}", square)

    def frechet(self, key: str, extractor: Extractor) -> list[Metric]:
        """Squared Frechet distance to the folder of real images, in the extractor's features."""
        paths = self.real
        digests = [fingerprints.of_file(path) for path in paths]
        real = self.features(extractor, paths, digests, f"{extractor.identity}-real", FRECHET_PIXELS)
        value = frechet_distance(self.own_features(extractor, FRECHET_PIXELS), real)
        unit = f"squared Frechet distance, {extractor.name}; {len(self.prompts)} against {len(paths)} real images"
        return [Metric(key, "set", unit, higher_is_better=False, value=value)]

    def _tell_versions(self, what: str, then: Mapping[str, str]) -> None:
        changed = [f"{name} {old} (now {self.versions.get(name)})" for name, old in then.items()
                   if old != self.versions.get(name)]  # fmt: skip
        if changed:
            self.notes.append(f"{what} were made with {', '.join(changed)}")

    def _batches(self, indices: Sequence[int]) -> Iterator[list[int]]:
        size = self.settings.batch_size
        return (list(indices[first : first + size]) for first in range(0, len(indices), size))

    def _path(self, index: int) -> Path:
        return self.out / "images" / f"{index:05d}.png"


def _diversity(work: Evaluation) -> list[Metric]:
    name, count, own = work.extractor.name, work.settings.images_per_prompt, work.own_features(work.extractor)
    measures = [
        ("pairwise_distance", diversity.cosine_distance, f"mean cosine distance within a prompt, {name}"),
        ("vendi", diversity.vendi_score, f"Vendi score within a prompt, 1 to {count}, {name}"),
    ]
    return [Metric.of_prompts(key, diversity.within(work.units, own, measure), unit) for key, measure, unit in measures]


def _class_entropy(work: Evaluation) -> list[Metric]:
    classes = str(work.settings.classes)
    probe = Probe.read(Path(classes)) if classes.endswith(".json") else work.clip.label_probe(classes.split("|"))
    own = work.own_features(work.extractor)
    if own.shape[1] != probe.weight.shape[1]:
        raise UsageError(
            f"{option('classes')}: the probe takes {probe.weight.shape[1]} features, {option('features')} gives "
            f"{own.shape[1]}"
        )
    return features.class_entropy(probe, own, work.units, work.extractor.name)


_SPECIAL: dict[str, Callable[[Evaluation], list[Metric]]] = {
    "diversity": _diversity,
    "class_entropy": _class_entropy,
    "fid": lambda work: work.frechet("fid", features.inception_extractor(work.settings.inception, work.device)),
    "frechet_clip": lambda work: work.frechet("frechet_clip", features.clip_extractor(work.clip)),
}


def _seconds(out: Path) -> float:
    """Seconds spent before this resume; kept apart from the results, which must not depend on them."""
    seconds = jsonl.read_json(out / _COST).get("seconds", 0.0)
    if not isinstance(seconds, int | float):
        raise UsageError(f"{out / _COST} is damaged: remove it to count the seconds from zero")
    return float(seconds)
