"""The schema of an ablation recipe, and the training recipes of its rows. Nothing here imports torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from rlhf_t2i.errors import UsageError, given_in
from rlhf_t2i.evaluation import settings as evaluation_settings
from rlhf_t2i.evaluation.settings import Settings
from rlhf_t2i.recipe import kinds, mistakes, reading
from rlhf_t2i.recipe.schema import Recipe, Section, repeated
from rlhf_t2i.utils import files

RowName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,79}$")]


class Variant(Section):
    """One row of the table: changes to the base recipe."""

    name: RowName
    label: str
    set: dict[str, Any] = Field(default_factory=dict, description="keys of the training recipe, a.b: value")
    paper_scale: float | None = Field(default=None, description="alpha_r as the paper counts; times scale_unit")
    train: bool = Field(default=True, description="false: the generator as it is")
    seeds: list[int] | None = Field(default=None, min_length=1)
    paper: dict[str, float] = Field(default_factory=dict, description="the paper's own figures, by metric")
    note: str = ""


class Frontier(Section):
    """Rows that differ in the reward's scale alone: a curve from which equal rewards are read off."""

    name: str
    rows: list[str] = Field(min_length=2)


class Claim(Section):
    """``more`` has a higher value of ``metric`` than ``less``: two rows, or two frontiers at equal reward."""

    text: str
    metric: str
    more: str
    less: str
    at_equal: str | None = Field(default=None, description="the reward at which two frontiers are compared")


class Ablation(Section):
    """A whole ablation."""

    title: str
    base: str = Field(description="the training recipe that rows change; relative to this file")
    set: dict[str, Any] = Field(default_factory=dict, description="changes to the base for every row")
    seeds: list[int] = Field(default=[0], min_length=1)
    parallel: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = 1
    scale_key: str = "algorithm.rewards.0.scale"
    scale_unit: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default=1.0, description="one unit of the paper's alpha_r with these models; auto measures it first"
    )
    calibration_steps: int = Field(default=10, ge=1)
    discard_checkpoints: bool = Field(default=False, description="remove a row's checkpoints once it is finished")
    evaluation: dict[str, Any] = Field(description="the settings of rlhf-t2i eval, the same for every row")
    initial: str = Field(description="the row that differences are taken from")
    labels: dict[str, str] = Field(default_factory=dict, description="metric names for the table's head")
    factors: dict[str, float] = Field(default_factory=dict, description="a metric is shown times this")
    plots: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(default_factory=list)
    rows: list[Variant] = Field(min_length=1)
    frontiers: list[Frontier] = Field(default_factory=list)
    claims: list[Claim] = Field(default_factory=list)

    @model_validator(mode="after")
    def _names_exist(self) -> Ablation:
        names = [row.name for row in self.rows]
        twice = repeated(names)
        if twice is not None:
            raise ValueError(f"two rows are called {twice!r}")
        _known(self.initial, names, "initial")
        for frontier in self.frontiers:
            for name in frontier.rows:
                _known(name, names, f"frontier {frontier.name!r}")
        frontiers = [frontier.name for frontier in self.frontiers]
        for claim in self.claims:
            for name in (claim.more, claim.less):
                _known(name, frontiers if claim.at_equal else names, f"claim {claim.text!r}")
        return self

    def label(self, metric: str) -> str:
        """A metric's name in the table's head."""
        return self.labels.get(metric, metric)

    def factor(self, metric: str) -> float:
        """What a metric is multiplied by where it is shown (a CLIP score is 100 times the cosine)."""
        return self.factors.get(metric, 1.0)


def _known(name: str, names: list[str], where: str) -> None:
    if name not in names:
        raise ValueError(f"{where} names {name!r}; {mistakes.hint(name, names)}")


def load(path: str | Path) -> Ablation:
    """Read an ablation recipe.

    Raises:
        UsageError: One sentence naming the file, the line where it is known, and the key.
    """
    data, source = reading.read(path)
    kinds.check(data, source.path, "ablate")
    try:
        ablation = Ablation.model_validate(reading.resolve_paths(data, source.folder))
    except ValidationError as error:
        raise mistakes.explain(error, Ablation, data, source.where) from None
    base = files.absolute(ablation.base, source.folder)
    return ablation.model_copy(update={"base": str(base)})


def overrides(ablation: Ablation, variant: Variant, seed: int, more: list[str]) -> list[str]:
    """The ``--set`` arguments of one training run; later ones win."""
    settings = dict(ablation.set)
    if variant.paper_scale is not None:
        # "auto" stands for a unit that is measured before the first row; until then the recipe is only checked.
        unit = 1.0 if ablation.scale_unit == "auto" else ablation.scale_unit
        settings[ablation.scale_key] = variant.paper_scale * unit
    settings |= variant.set
    texts = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
    return [*texts, *more, f"seed={seed}"]


def overridden(ablation: Ablation, more: list[str], only: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Rows, and the keys of their own that ``--set`` takes from them: they may no longer be what their names say."""
    keys = [text.partition("=")[0] for text in more]
    rows = [row for row in ablation.rows if not only or row.name in only]
    return [(row.name, key) for row in rows for key in keys if key in row.set]


def training_recipe(ablation: Ablation, variant: Variant, seed: int, more: list[str]) -> Recipe:
    """The resolved training recipe of one row and seed.

    Raises:
        UsageError: The row makes no valid recipe; names the row.
    """
    try:
        return reading.load(ablation.base, overrides(ablation, variant, seed, more))
    except UsageError as error:
        raise UsageError(f"row {variant.name!r}: {error}") from None


def evaluation(ablation: Ablation, variant: Variant, recipe: Recipe, run: Path) -> Settings:
    """The evaluation of one row: the exported generator, or the initial one where nothing is trained.

    Raises:
        UsageError: The ablation's ``evaluation`` sets what the rows decide.
    """
    values = dict(ablation.evaluation)
    decided = ("model", "base", "vae", "student", "steps", "guidance", "height", "width")
    taken = next((key for key in decided if key in values), None)
    if taken:
        raise UsageError(f"evaluation: {taken!r} comes from the rows; remove it")
    if variant.train:
        return _settings(values | {"model": str(run / "model")})
    models, student = recipe.models, recipe.student.model_dump(exclude_unset=True)
    drawn = {"model": models.generator, "base": models.reference, "vae": models.vae, "student": student}
    return _settings(values | drawn | {"height": models.height, "width": models.width})


def _settings(values: Mapping[str, object]) -> Settings:
    with given_in("table"):
        return evaluation_settings.build(values)
