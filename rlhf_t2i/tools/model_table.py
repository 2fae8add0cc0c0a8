"""A table of models: each drawn and scored like the others, timed, and set beside published figures."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from rlhf_t2i.errors import UsageError, given_in
from rlhf_t2i.evaluation import settings as evaluation_settings
from rlhf_t2i.evaluation.results import Results, dumps, markdown_table
from rlhf_t2i.evaluation.settings import Drawing, Settings
from rlhf_t2i.plugins import registry
from rlhf_t2i.recipe import kinds, mistakes, reading
from rlhf_t2i.recipe.schema import Section, repeated
from rlhf_t2i.tools.ablation.schema import RowName
from rlhf_t2i.utils import files, targets
from rlhf_t2i.utils.jsonl import read_json
from rlhf_t2i.utils.numbers import DASH
from rlhf_t2i.utils.quiet import quietly

if TYPE_CHECKING:
    from rlhf_t2i.evaluation.run import Progress

_TEN = 10  # published times are per ten images
_FILES = ("table.md", "table.json")


class Row(Drawing):
    """One model: how it is drawn, and what was published of it."""

    name: RowName
    label: str
    paper: dict[str, float] = Field(default_factory=dict, description="published figures by metric")
    paper_seconds: float | None = Field(None, description="published seconds per ten images")
    paper_gb: float | None = Field(None, description="published peak memory, in 10^9 bytes")


class ModelTable(Section):
    """A whole table."""

    title: str
    evaluation: dict[str, Any] = Field(description="the settings of rlhf-t2i eval, the same for every row")
    timed_images: int = Field(
        10, ge=1, le=1000, description="images that are timed, one per call, after one that is not"
    )
    labels: dict[str, str] = Field(default_factory=dict, description="metric names for the table's head")
    factors: dict[str, float] = Field(default_factory=dict, description="a metric is shown times this")
    note: str = ""
    rows: list[Row] = Field(min_length=1)

    @model_validator(mode="after")
    def _names(self) -> ModelTable:
        names = [row.name for row in self.rows]
        twice = repeated(names)
        if twice is not None:
            raise ValueError(f"two rows are called {twice!r}")
        written = next((name for name in names if name in _FILES), None)
        if written:
            raise ValueError(f"no row can be called {written!r}: a file of the table is")
        taken = next((key for key in Drawing.model_fields if key in self.evaluation), None)
        if taken:
            raise ValueError(f"evaluation: {taken!r} comes from the rows; remove it")
        return self


@dataclass(frozen=True)
class Timing:
    """What drawing costs.

    Attributes:
        seconds: Per ten images, drawn one per call.
        memory: Peak bytes of the GPU; None on a CPU.
        device: Its name.
    """

    seconds: float
    memory: int | None
    device: str


def load(path: str | Path, limit: int | None = None) -> tuple[ModelTable, dict[str, Settings]]:
    """Read a table's recipe, and the evaluation of every row by its name.

    Args:
        path: The YAML file; relative paths in it are relative to its folder.
        limit: Only the first prompts.

    Raises:
        UsageError: One sentence naming the file, the line where it is known, and the key.
    """
    data, source = reading.read(path)
    kinds.check(data, source.path, "eval")
    try:
        table = ModelTable.model_validate(reading.resolve_paths(data, source.folder))
    except ValidationError as error:
        raise mistakes.explain(error, ModelTable, data, source.where) from None
    shared = table.evaluation | ({} if limit is None else {"limit": limit})
    built = {}
    for row in table.rows:
        drawn = row.model_dump(include=set(Drawing.model_fields))
        try:
            with given_in("table"):
                built[row.name] = evaluation_settings.build(shared | drawn)
        except UsageError as error:
            raise UsageError(f"{source.path}: row {row.name!r}: {error}") from None
    _check_metrics(table, built[table.rows[0].name].named, source.path)
    return table, built


def _check_metrics(table: ModelTable, measured: Iterable[str], file: Path) -> None:
    """Refuse figures of metrics that do not exist: they would silently be in no column."""
    known = [*registry.registered(registry.REWARDS), *evaluation_settings.SPECIAL, *measured]
    papers = {f"row {row.name!r}: paper": row.paper for row in table.rows}
    places: dict[str, Iterable[str]] = {"labels": table.labels, "factors": table.factors, **papers}
    for place, keys in places.items():
        stray = next((key for key in keys if key not in known), None)
        if stray is not None:
            raise UsageError(f"{file}: {place}: unknown metric {stray!r}; {mistakes.hint(stray, known)}")


def run(table: ModelTable, settings: Mapping[str, Settings], out: Path, progress: Progress) -> str:
    """Measure every row and write ``table.md`` and ``table.json``; run again after a kill, it continues.

    Args:
        table: The table.
        settings: Of :func:`load`.
        out: Gets a folder per row.
        progress: Called with row and phase, and how many of how many images went through it.

    Returns:
        The table in Markdown.

    Raises:
        UsageError: A model, prompt list or reward that can be refused before anything is drawn; names the row.
        RunError: Drawing or scoring failed.
    """
    from rlhf_t2i.evaluation import models
    from rlhf_t2i.evaluation.run import evaluate

    targets.check_folder(out, "--out")
    for name, chosen in settings.items():
        try:
            with given_in("table"):
                models.load(chosen.drawing)
        except UsageError as error:
            raise UsageError(f"row {name!r}: {error}") from None
    results, timings = {}, {}
    for row in table.rows:
        folder = out / row.name

        def show(phase: str, done: int, total: int, name: str = row.name) -> None:
            progress(f"{name}: {phase}", done, total)

        with given_in("table"):
            results[row.name] = evaluate(settings[row.name], folder, show)
        timings[row.name] = _timed(settings[row.name], table.timed_images, folder / "timing.json", show)
    text = render(table, results, timings)
    with files.disk_errors(out):
        files.write_text(out / "table.md", text)
        files.write_text(out / "table.json", dumps(_plain(table, results, timings)))
    return text


def _timed(settings: Settings, count: int, file: Path, progress: Progress) -> Timing:
    """Time a row's drawing, or read what an earlier call measured with the same settings."""
    key = json.dumps([settings.model_dump(mode="json"), count], sort_keys=True)
    found = read_json(file)
    if found.get("settings") == key:
        try:
            return TypeAdapter(Timing).validate_python(found.get("timing"))
        except ValidationError:
            raise UsageError(f"{file} is damaged: remove it to time again") from None
    with quietly():
        timing = measure(settings, count, progress)
    with files.disk_errors(file):
        files.write_json(file, {"settings": key, "timing": asdict(timing)})
    return timing


def measure(settings: Settings, count: int, progress: Progress = lambda phase, done, total: None) -> Timing:
    """Draw one image after another, the first of them untimed.

    Args:
        settings: Of the model.
        count: Timed images.
        progress: Called after each.
    """
    import torch

    from rlhf_t2i.evaluation import benchmarks, models
    from rlhf_t2i.utils.device import default_device

    gc.collect()  # the evaluation's own networks
    device = default_device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = models.load(settings.drawing, device, settings.precision)
    prompts = benchmarks.load(settings.prompts, settings.column).prompts
    chosen = [prompts[index % len(prompts)] for index in range(count + 1)]
    began = 0.0
    for index, prompt in enumerate(chosen):
        model.images([prompt], [(settings.seed, "timing", index)])  # they arrive on the CPU: nothing is still running
        if index == 0:
            began = time.perf_counter()
        else:
            progress("timing", index, count)
    seconds = (time.perf_counter() - began) * _TEN / count
    name = torch.cuda.get_device_name() if cuda else "CPU"
    return Timing(seconds, torch.cuda.max_memory_allocated() if cuda else None, name)


def render(table: ModelTable, results: Mapping[str, Results], timings: Mapping[str, Timing]) -> str:
    """The table in Markdown: measured values, with published ones in brackets."""
    metrics = list(dict.fromkeys(key for found in results.values() for key in found.metrics))
    head = ["model", *(table.labels.get(metric, metric) for metric in metrics), "s per 10 images", "peak GB"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in table.rows:
        found, timing = results[row.name], timings[row.name]
        factors = [table.factors.get(metric, 1.0) for metric in metrics]
        cells = [
            _cell(
                found.metrics[metric].value * factor if metric in found.metrics else None, row.paper.get(metric), ".4f"
            )
            for metric, factor in zip(metrics, factors, strict=True)
        ]
        memory = None if timing.memory is None else timing.memory / 1e9
        lines.append(
            [row.label, *cells, _cell(timing.seconds, row.paper_seconds, ".2f"), _cell(memory, row.paper_gb, ".1f")]
        )
    devices = ", ".join(sorted({timing.device for timing in timings.values()}))
    images = {len(found.prompts) for found in results.values()}
    facts = (
        f"{' or '.join(map(str, sorted(images)))} images per model; published figures in brackets. Times: one image "
        f"per call on {devices}, scaled to ten."
    )
    return f"# {table.title}\n\n{markdown_table(lines)}\n{facts}{' ' + table.note if table.note else ''}\n"


def _cell(value: float | None, published: float | None, form: str) -> str:
    shown = DASH if value is None else format(value, form)
    return shown if published is None else f"{shown} ({published:g})"


def _plain(table: ModelTable, results: Mapping[str, Results], timings: Mapping[str, Timing]) -> dict[str, object]:
    return {
        row.name: {
            "label": row.label,
            "metrics": {key: metric.value for key, metric in results[row.name].metrics.items()},
            "timing": asdict(timings[row.name]),
            "paper": {**row.paper, "seconds": row.paper_seconds, "gb": row.paper_gb},
        }
        for row in table.rows
    }
