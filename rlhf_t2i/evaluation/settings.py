"""What one evaluation measures. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf_t2i.errors import UsageError, option
from rlhf_t2i.plugins import registry
from rlhf_t2i.recipe import mistakes, shipped
from rlhf_t2i.recipe.schema import StudentSettings

DEFAULT_FEATURES = "openai/clip-vit-base-patch32"
SPECIAL = {
    "diversity": ("pairwise_distance", "vendi"),
    "fid": ("fid",),
    "frechet_clip": ("frechet_clip",),
    "class_entropy": ("class_entropy", "class_entropy_overall"),
}
"""Metrics of sets of images, and the keys of their results; every other name is a reward plugin."""


class Drawing(BaseModel):
    """How a model is drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(description="a run's folder, a diffusers folder, a hub id, or a network alone (with base)")
    base: str | None = Field(
        None, description="pipeline that lends text encoders and VAE when model is a network alone"
    )
    vae: str | None = Field(None, description="another VAE for decoding")
    student: StudentSettings | None = Field(
        None, description="draws a one- or few-step generator with these steps; those of an exported model when absent"
    )
    steps: int | None = Field(None, ge=1, le=1000, description="sampling steps of a many-step model; 50 when absent")
    guidance: float = Field(7.5, ge=0, le=1000, allow_inf_nan=False, description="of a many-step model")
    height: int | None = Field(None, ge=8, le=8192, description="pixels; the model's own when absent")
    width: int | None = Field(None, ge=8, le=8192, description="pixels; the model's own when absent")


class Settings(Drawing):
    """One evaluation."""

    prompts: str = Field(description="a file, a benchmark (parti, hpsv2, coco) as name or name:path, or emoji64")
    column: str = "prompt"
    limit: int | None = Field(None, ge=1, description="only the first prompts")
    images_per_prompt: int = Field(1, ge=1, le=10_000)
    seed: int = Field(0, ge=0, le=2**62)
    batch_size: int = Field(16, ge=1, le=4096)
    precision: Literal["fp32", "bf16"] = "fp32"
    metrics: list[str] = Field(
        default_factory=lambda: ["clip"], description="names, or LABEL=NAME to measure one reward twice"
    )
    options: dict[str, dict[str, Any]] = Field(default_factory=dict, description="a reward's own options, by label")
    features: str = Field(DEFAULT_FEATURES, description="CLIP for diversity and frechet_clip, or 'vae'")
    real: str | None = Field(None, description="folder of real images, for fid and frechet_clip")
    inception: str | None = Field(None, description="Inception weights file, for fid")
    classes: str | None = Field(None, description="labels 'a|b|c' or a probe's JSON, for class_entropy")

    @property
    def drawing(self) -> Drawing:
        """How the model is drawn."""
        return Drawing.model_validate(self.model_dump(include=set(Drawing.model_fields)))

    @property
    def named(self) -> dict[str, str]:
        """Each metric's name by its label."""
        return names_by_label(self.metrics)


def check(settings: Settings) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises:
        UsageError: An unknown metric, or one that lacks what it needs.
    """
    known = [*registry.registered(registry.REWARDS), *SPECIAL]
    for name in settings.named.values():
        if name not in known and ".py:" not in name:
            raise UsageError(f"{option('metrics')}: unknown metric {name!r}; {mistakes.hint(name, known)}")
    if len(settings.named) < len(settings.metrics):
        raise UsageError(f"{option('metrics')} {','.join(settings.metrics)}: two have one label: write LABEL=NAME")
    keys = {*SPECIAL, *(key for keys in SPECIAL.values() for key in keys)}
    taken = next((label for label, name in settings.named.items() if label in keys and name not in SPECIAL), None)
    if taken is not None:
        raise UsageError(f"{option('metrics')} {taken}={settings.named[taken]}: {taken} is another metric's name")
    stray = next((name for name in settings.options if name not in settings.named), None)
    if stray:
        raise UsageError(f"{option('set')} {stray}.…: {stray!r} is not among the metrics {', '.join(settings.named)}")
    for name in ("diversity", "class_entropy"):
        if name in settings.named.values() and settings.images_per_prompt < 2:
            raise UsageError(
                f"{option('metrics')} {name} compares images of one prompt: give {option('images-per-prompt')} "
                "2 or more"
            )
    for name in ("fid", "frechet_clip"):
        if name not in settings.named.values():
            continue
        if settings.real is None:
            raise UsageError(
                f"{option('metrics')} {name} compares with real images: give their folder with {option('real')}"
            )
        if not Path(settings.real).is_dir():
            raise UsageError(f"{option('real')}: no such folder: {settings.real}")
    if "frechet_clip" in settings.named.values() and settings.features == "vae":
        raise UsageError(
            f"{option('metrics')} frechet_clip needs the features of a CLIP: give {option('features')} a CLIP model"
        )
    if "class_entropy" in settings.named.values() and not settings.classes:
        raise UsageError(
            f"{option('metrics')} class_entropy needs {option('classes')}: labels written 'a|b|c', or a probe's "
            "JSON file"
        )
    if settings.student is not None and settings.steps is not None:
        raise UsageError(
            f"{option('steps')} is for a many-step model, {option('timesteps')} for a few-step generator: not both"
        )


def build(
    values: Mapping[str, object], place: str | Callable[[mistakes.KeyPath], str] = "evaluation", noun: str = "key"
) -> Settings:
    """Validate values into settings.

    Args:
        values: By field.
        place: Where they were given, or a function that tells it for a field, for error messages.
        noun: What a field is called there.

    Raises:
        UsageError: One sentence naming the field.
    """
    values = {name: shipped.resolve_all(value) for name, value in values.items()}
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise mistakes.explain(error, Settings, values, place, noun) from None
    check(settings)
    return settings


def names_by_label(metrics: Sequence[str]) -> dict[str, str]:
    """Each metric's name by its label, of ``NAME`` or ``LABEL=NAME``."""
    return dict(map(_label, metrics))


def _label(metric: str) -> tuple[str, str]:
    label, equals, name = metric.partition("=")
    if equals:
        return label, name
    return (metric.rpartition(":")[2] if ".py:" in metric else metric), metric
