"""What an evaluation measured: one schema and one file, ``results.json``, for runs and for ``rlhf-t2i eval``.

Prompts are the independent units: several images of one prompt are averaged before any spread is taken.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from pydantic import BaseModel, BeforeValidator, TypeAdapter, ValidationError

from rlhf_t2i import __version__
from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe import mistakes
from rlhf_t2i.utils import files, stats
from rlhf_t2i.utils.jsonl import read_json
from rlhf_t2i.utils.numbers import DASH

NAME = "results.json"
Kind = Literal["train", "eval", "diversity", "set"]
"""A reward that trains, a score that only measures, diversity within a prompt, a number of the whole set of images."""


Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A float that is null in JSON where it is not finite."""


class Row(TypedDict):
    """A row of the table: a metric's mean over all prompts or a group's, and its 95% interval."""

    metric: str
    group: str
    mean: float | None
    low: float | None
    high: float | None
    prompts: int
    unit: str
    higher_is_better: bool


@dataclass(frozen=True)
class Metric:
    """One measured quantity.

    Attributes:
        key: Its label.
        kind: See :data:`Kind`.
        unit: Of its values.
        higher_is_better: Its direction.
        by_image: One value per image, or None.
        by_prompt: One value per prompt; [] for a number of the whole set.
        value: The mean over prompts, or the number of the whole set (without an interval: a Frechet distance is biased
            under resampling).
        shares: Of each class over all images, for the entropy of classes.
    """

    key: str
    kind: Kind = "eval"
    unit: str = ""
    higher_is_better: bool = True
    by_image: list[Number] | None = None
    by_prompt: list[Number] = field(default_factory=list)
    value: Number = math.nan
    shares: dict[str, float] | None = None

    @classmethod
    def of_images(
        cls, key: str, values: Sequence[float], units: Sequence[Hashable], kind: Kind = "eval", unit: str = "",
        higher_is_better: bool = True,
    ) -> Metric:  # fmt: skip
        """A score of single images; ``units`` names each image's prompt."""
        by_prompt = stats.by_unit(values, units).tolist()
        return cls(key, kind, unit, higher_is_better, list(values), by_prompt, stats.mean(by_prompt).value)

    @classmethod
    def of_prompts(
        cls, key: str, values: Sequence[float], unit: str = "", shares: dict[str, float] | None = None
    ) -> Metric:
        """The diversity of each prompt's images."""
        return cls(key, "diversity", unit, by_prompt=list(values), value=stats.mean(values).value, shares=shares)


@dataclass(frozen=True)
class Results:
    """One evaluation.

    Attributes:
        prompts: One per image.
        metrics: By label.
        groups: One per image, for separate rows of the table; [] for none.
        images: Files per image, relative to ``folder``; [] where none are kept.
        step: Generator updates done, for an evaluation inside a run.
        facts: How the images were drawn: for the record.
        notes: Warnings for the user.
        folder: Where results.json lies.
    """

    prompts: list[str]
    metrics: dict[str, Metric]
    groups: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    step: int = 0
    facts: Mapping[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    folder: Path = Path()

    @property
    def units(self) -> list[tuple[str, str]]:
        """The prompt that each image counts for; the same prompt in two groups counts twice."""
        return list(zip(self.groups or [""] * len(self.prompts), self.prompts, strict=True))

    @cached_property
    def members(self) -> dict[tuple[str, str], list[int]]:
        """The images of each prompt, in order of first appearance."""
        members: dict[tuple[str, str], list[int]] = {}
        for index, unit in enumerate(self.units):
            members.setdefault(unit, []).append(index)
        return members

    @cached_property
    def table(self) -> list[Row]:
        """One row per metric, then per group and metric, with 95% bootstrap intervals over prompts."""
        rows = [_row(metric, metric.by_prompt, "") for metric in self.metrics.values()]
        of_prompts = [group for group, _ in self.members]
        for group in dict.fromkeys(filter(None, self.groups)):
            chosen = [index for index, name in enumerate(of_prompts) if name == group]
            rows += [_row(m, [m.by_prompt[i] for i in chosen], group) for m in self.metrics.values() if m.by_prompt]
        return rows

    def markdown(self) -> str:
        """The table for a reader."""
        return _markdown(self.table)

    def write(self) -> None:
        """Write ``results.json`` atomically; nothing in it depends on the time, the path or resumes."""
        data = {
            "version": __version__, "step": self.step, **self.facts,
            "table": self.table,
            "metrics": {key: asdict(metric) for key, metric in self.metrics.items()},
            "images": [{"file": file, "prompt": prompt, "group": group} for file, prompt, group in
                       zip(self._per_image(self.images), self.prompts, self._per_image(self.groups), strict=True)],
        }  # fmt: skip
        files.write_atomic(self.folder / NAME, dumps(data), durable=True)

    def write_tables(self, heading: str) -> None:
        """Write ``table.md`` and ``table.csv`` beside results.json."""
        rows = self.table
        files.write_atomic(self.folder / "table.md", f"{heading}\n\n{_markdown(rows)}")
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(rows[0]) if rows else ["metric"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        files.write_atomic(self.folder / "table.csv", buffer.getvalue())

    def _per_image(self, texts: Sequence[str]) -> Sequence[str]:
        return texts or [""] * len(self.prompts)


class _Image(BaseModel):
    file: str
    prompt: str
    group: str


class _File(BaseModel):
    """What :func:`read` takes from results.json."""

    step: int
    images: list[_Image]
    metrics: dict[str, dict[str, object]]


def read(folder: Path) -> Results | None:
    """Read ``results.json`` of a folder; None where it is missing.

    Raises:
        UsageError: It is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        data = _File.model_validate(read_json(path))
        metrics = {
            key: TypeAdapter(Metric).validate_python({**entry, "key": key}) for key, entry in data.metrics.items()
        }
    except ValidationError as error:
        place = mistakes.place(error) or "not an object"
        raise UsageError(f"{path} is damaged ({place})") from None
    prompts = [image.prompt for image in data.images]
    groups, names = [image.group for image in data.images], [image.file for image in data.images]
    found = Results(prompts, metrics, _or_empty(groups), _or_empty(names), data.step, folder=folder)
    for metric in metrics.values():
        by_image = [] if metric.by_image is None else metric.by_image
        if len(by_image) not in (0, len(prompts)) or len(metric.by_prompt) not in (0, len(found.members)):
            raise UsageError(f"{path} is damaged ({metric.key}: another number of values than of images or prompts)")
    return found


def exist(folder: Path) -> bool:
    """Whether a folder holds the results of a finished evaluation."""
    return (folder / NAME).is_file()


def dumps(data: object) -> str:
    """JSON that any reader takes: numbers that are not finite become null, and the same data gives the same bytes."""
    return json.dumps(files.finite(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _or_empty(texts: list[str]) -> list[str]:
    return texts if any(texts) else []


def _row(metric: Metric, units: Sequence[float], group: str) -> Row:
    value = stats.mean(units).value if units else metric.value
    interval = stats.bootstrap_interval(units) if units else (math.nan, math.nan)
    mean, low, high = (float(v) if math.isfinite(v) else None for v in (value, *interval))
    return {
        "metric": metric.key, "group": group, "mean": mean, "low": low, "high": high, "prompts": len(units),
        "unit": metric.unit, "higher_is_better": metric.higher_is_better,
    }  # fmt: skip


def _markdown(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; the group column only where there are groups."""
    grouped = any(row["group"] for row in rows)
    lines = [["metric", *(["group"] if grouped else []), "mean", "95% interval", "prompts", "unit"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        interval = DASH if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}"
        mean = "not a number" if row["mean"] is None else f"{row['mean']:.4f}"
        group = [row["group"] or "all"] if grouped else []
        lines.append([row["metric"], *group, mean, interval, str(row["prompts"] or "all"), row["unit"]])
    return markdown_table(lines)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as a Markdown table; bars and line breaks in a cell would end it."""
    rows = ([" ".join(cell.replace("|", "/").split()) for cell in line] for line in lines)
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
