"""What a whole run costs: hours, GPU-hours and disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning import zero
from rlhf_t2i.tools.planning.memory import TRAINED, zero_setting
from rlhf_t2i.tools.planning.time import StepTime

if TYPE_CHECKING:
    from rlhf_t2i.families.footprints import Footprints

_BYTES_PER_PIXEL = 2
"""Of a photograph as PNG."""


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes, at its largest.

    Attributes:
        checkpoint: One checkpoint.
        checkpoints: All that lie there while another one is written.
        model: The exported pipeline.
        samples: The previews.
    """

    checkpoint: int
    checkpoints: int
    model: int
    samples: int

    @property
    def total(self) -> int:
        """Everything."""
        return self.checkpoints + self.model + self.samples


def disk(recipe: Recipe, placed: Mapping[str, tuple[str, int]], networks: Footprints) -> Disk:
    """Bytes that a run writes."""
    settings, whole = recipe.optimization, networks.network().parameters()
    checkpoint = 4 * whole if settings.ema is not None else 0
    for role in TRAINED:
        optimizer = settings.generator if role == "learner" else settings.assistant
        numbers = sum(networks.network(optimizer.lora).sizes())
        saved = zero.saved(zero_setting(recipe, placed[role][1]))
        checkpoint += numbers * (saved - 6 if optimizer.kind == "adamw_8bit" else saved)
    policy = recipe.checkpoints
    written = -(-recipe.steps // policy.every)
    height, width = networks.store.size
    previews = recipe.logging.sample_count * (1 + recipe.steps // recipe.logging.samples_every)
    parts = networks.text_encoders().parameters() + networks.decoder().parameters()
    return Disk(
        checkpoint,
        checkpoint * min(policy.keep + policy.keep_best + 1, written),
        (4 if settings.precision == "fp32" else 2) * whole + 4 * parts,
        previews * height * width * _BYTES_PER_PIXEL,
    )


@dataclass(frozen=True)
class Duration:
    """Hours of a run on its devices; loading, compiling and writing checkpoints are not counted.

    Attributes:
        warmup: Of the assistant's updates, and of lessons of rewards that learn, before the first generator update.
        training: Of all generator updates.
        measuring: Of the tables before and after, monitors and previews.
        devices: Devices that are held meanwhile.
    """

    warmup: float
    training: float
    measuring: float
    devices: int

    @property
    def hours(self) -> float:
        """In all."""
        return self.warmup + self.training + self.measuring

    @property
    def gpu_hours(self) -> float:
        """Hours times devices."""
        return self.hours * self.devices


def duration(recipe: Recipe, seconds: StepTime, devices: int) -> Duration:
    """Hours of a run from the seconds of its steps."""
    logging, steps = recipe.logging, recipe.steps
    images = 2 * recipe.evaluation.images
    images += logging.sample_count * (1 + steps // logging.samples_every)
    if logging.watch_every:
        images += min(logging.watch_images, recipe.evaluation.images) * (steps // logging.watch_every)
    return Duration(
        warmup=(recipe.algorithm.assistant_warmup * seconds.assistant_update + seconds.lessons) / 3600,
        training=steps * seconds.step / 3600,
        measuring=images * seconds.image / 3600,
        devices=devices,
    )
