"""GenEval's checks with an object detector of the user's choice: are the objects there, how many, what color, where?

Subclass :class:`DetectorReward` and define ``detect``; a recipe names the class by its file. The checks come from a
JSON-lines file in the form of GenEval's ``evaluation_metadata.jsonl`` (Ghosh et al. 2023, arXiv:2310.11513).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from rlhf_t2i import plugins
from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils import files, inputs

Relation = Literal["left of", "right of", "above", "below"]


@dataclass(frozen=True)
class Detection:
    """An object in an image.

    Attributes:
        label: Its class, as the checks name it.
        box: (left, top, right, bottom) in pixels.
        confidence: In [0, 1].
        color: Its color's name; None where the detector does not tell.
    """

    label: str
    box: tuple[float, float, float, float]
    confidence: float = 1.0
    color: str | None = None


class Wanted(BaseModel):
    """An object that a prompt asks for."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    label: str = Field(alias="class", min_length=1)
    count: int = Field(1, ge=1)
    color: str | None = None
    position: tuple[Relation, int] | None = None


class Unwanted(BaseModel):
    """An object of which there must be fewer than ``count``."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    label: str = Field(alias="class", min_length=1)
    count: int = Field(1, ge=1)


class Check(BaseModel):
    """A line of the file: a prompt and what its image must show. Other keys (``tag``) are ignored."""

    prompt: str
    include: list[Wanted] = Field(min_length=1)
    exclude: list[Unwanted] = Field(default_factory=list)


class DetectorOptions(plugins.Options):
    """The checks, and how they count."""

    checks: str = Field(description="JSON-lines file in the form of GenEval's evaluation_metadata.jsonl")
    confidence: float = Field(0.3, ge=0, le=1, description="detections below it do not count")
    strict: bool = Field(False, description="GenEval's 0 or 1 in place of the share of checks that hold")


class DetectorReward(plugins.Reward):
    """The share of a prompt's checks that hold for its image, in [0, 1]: of counts, colors, positions and absences."""

    Options = DetectorOptions
    options: DetectorOptions
    differentiable = False
    value_range = (0.0, 1.0)
    unit = "share"

    @classmethod
    def preflight(cls, options: DetectorOptions) -> None:
        """Refuse a file of checks that cannot be read."""
        read_checks(options.checks)

    @classmethod
    def hub_models(cls, options: DetectorOptions) -> list[str]:
        """None; a subclass with a model names it."""
        return []

    @classmethod
    def refuse_prompts(cls, options: DetectorOptions, prompts: Iterable[str]) -> str | None:
        """A prompt without checks."""
        checks = read_checks(options.checks)
        return next((_unknown(options, prompt) for prompt in prompts if prompt not in checks), None)

    def detect(self, images: Tensor) -> list[list[Detection]]:
        """The objects in each of the images [B, 3, H, W] in [0, 1]."""
        raise NotImplementedError(f"{type(self).__name__} must define detect(images)")

    @cached_property
    def _checks(self) -> dict[str, Check]:
        return read_checks(self.options.checks)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Shares [B] of images [B, 3, H, W].

        Raises:
            ValueError: A prompt without checks, or a color asked of a detector that tells none.
        """
        scores = []
        for found, prompt in zip(self.detect(images), prompts, strict=True):
            if prompt not in self._checks:
                raise ValueError(_unknown(self.options, prompt))
            held = outcomes([d for d in found if d.confidence >= self.options.confidence], self._checks[prompt])
            scores.append(float(all(held)) if self.options.strict else sum(held) / len(held))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)


def _unknown(options: DetectorOptions, prompt: str) -> str:
    return f"{options.checks} has no checks for the prompt {prompt!r}"


def outcomes(found: Sequence[Detection], check: Check) -> list[bool]:
    """Which of a prompt's checks hold, as GenEval defines them: count, color and position of each object, absences.

    Raises:
        ValueError: A color is asked for and a detection has none.
    """
    objects = [_sure(found, wanted.label) for wanted in check.include]
    held = []
    for wanted, present in zip(check.include, objects, strict=True):
        counted = present
        if wanted.color is not None:
            if any(one.color is None for one in present):
                raise ValueError(f"the detector tells no color, and {check.prompt!r} asks for {wanted.color}")
            counted = [one for one in present if one.color == wanted.color]
            held.append(len(counted) >= wanted.count)
        held.append(len(present) >= wanted.count)
        if wanted.position is not None:
            relation, other = wanted.position
            others = objects[other] if other < len(objects) else []
            held.append(any(relation in relations(a, b) for a in counted for b in others))
    held += [len(_sure(found, unwanted.label)) < unwanted.count for unwanted in check.exclude]
    return held


def relations(a: Detection, b: Detection, margin: float = 0.1) -> set[str]:
    """Where ``a`` lies beside ``b``, by their centers.

    Offsets within ``margin`` of both objects' summed size count as none, and so does a direction that is less than half
    of the whole offset (GenEval's rule).
    """
    offset = []
    for low, high in ((0, 2), (1, 3)):
        distance = (a.box[low] + a.box[high] - b.box[low] - b.box[high]) / 2
        size = margin * (a.box[high] - a.box[low] + b.box[high] - b.box[low])
        offset.append(max(abs(distance) - size, 0.0) * (1 if distance > 0 else -1))
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    if length == 0:
        return set()
    x, y = offset[0] / length, offset[1] / length
    named = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in named.items() if holds}


def _sure(found: Sequence[Detection], label: str) -> list[Detection]:
    return [one for one in found if one.label == label]


def read_checks(path: str) -> dict[str, Check]:
    """The checks of a file by prompt.

    Raises:
        UsageError: No such file, or a line of another form; names the line.
    """
    file = files.expanded(path)
    if not file.exists():
        raise UsageError(f"reward 'detector': no such file of checks: {path}")
    checks: dict[str, Check] = {}
    text = inputs.read_text(file, "file of checks", inputs.CONFIG)
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut a prompt at U+2028
        if not line.strip():
            continue
        try:
            check = Check.model_validate(json.loads(line))
        except (ValidationError, ValueError, RecursionError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise UsageError(f"{path}, line {number}: not a line of GenEval's metadata: {reason}") from None
        checks[check.prompt] = check
    if not checks:
        raise UsageError(f"{path} holds no checks")
    return checks
