"""The ablation's table: measured values with intervals, the paper's own figures marked as such beside them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_t2i.evaluation import journal
from rlhf_t2i.tools.ablation.analysis import Bootstrap, EqualReward, Estimate, Finding, RowData, equal_reward, judge
from rlhf_t2i.tools.ablation.execute import Task
from rlhf_t2i.tools.ablation.schema import Ablation
from rlhf_t2i.utils import files
from rlhf_t2i.utils.jsonl import read_json
from rlhf_t2i.utils.numbers import DASH


def collect(tasks: Sequence[Task]) -> tuple[dict[str, RowData], list[dict[str, Any]]]:
    """The finished rows' measurements, and the metrics (key, unit, higher_is_better) in their order."""
    rows: dict[str, RowData] = {}
    metrics: dict[str, dict[str, Any]] = {}
    for task in tasks:
        data = read_json(task.evaluated / "results.json") if task.finished else {}
        if not data:
            continue
        for entry in data["table"]:
            if not entry["group"]:
                metrics.setdefault(entry["metric"], {key: entry[key] for key in ("metric", "unit", "higher_is_better")})
        row = rows.setdefault(task.row.name, RowData(task.row.name, {}))
        means = {entry["metric"]: entry["mean"] for entry in data["table"] if not entry["group"]}
        for key, metric in data["metrics"].items():
            units = [math.nan if v is None else v for v in metric["by_prompt"]]
            if units:
                line = np.array([units], dtype=np.float64)
                row.values[key] = np.vstack([row.values[key], line]) if key in row.values else line
            else:
                row.single.setdefault(key, []).append(math.nan if means[key] is None else means[key])
    return rows, list(metrics.values())


class Table:
    """Everything that the rows say.

    Args:
        ablation: The recipe.
        tasks: Of which the finished ones count.
    """

    def __init__(self, ablation: Ablation, tasks: Sequence[Task]) -> None:
        self.ablation, self.tasks = ablation, tasks
        self.data, self.metrics = collect(tasks)
        self.boot = Bootstrap(self.data)
        self.rows = [row for row in ablation.rows if row.name in self.data]
        self.missing = [task.name for task in tasks if not task.finished]
        self.findings: list[Finding] = [judge(claim, ablation, self.boot) for claim in ablation.claims]
        self.equal: list[EqualReward] = self._equal()

    def estimate(self, row: str, metric: str) -> Estimate:
        """A row's mean, in the unit it is shown in."""
        factor, found = self.ablation.factor(metric), self.boot.estimate(row, metric)
        return Estimate(found.value * factor, found.low * factor, found.high * factor)

    def change(self, row: str, metric: str) -> Estimate:
        """A row's mean less the initial row's, paired over prompts, in the unit it is shown in."""
        factor, found = self.ablation.factor(metric), self.boot.difference(row, self.ablation.initial, metric)
        return Estimate(found.value * factor, found.low * factor, found.high * factor)

    @property
    def has_initial(self) -> bool:
        """Whether the row that changes are taken from is finished."""
        return self.ablation.initial in self.data

    def seeds(self, row: str) -> int:
        """How many seeds of a row are finished."""
        return max((len(m) for m in self.data[row].values.values()), default=1)

    def write(self, out: Path) -> None:
        """Write ``table.md``, ``table.csv`` and ``table.json``: the same rows give the same bytes."""
        files.write_atomic(out / "table.md", self.markdown())
        files.write_atomic(out / "table.csv", self._csv())
        files.write_atomic(out / "table.json", journal.dumps(self._json()))

    def markdown(self) -> str:
        """The table for a reader."""
        keys = [metric["metric"] for metric in self.metrics]
        has_paper = {key: any(key in row.paper for row in self.rows) for key in keys}
        head = ["row", "seeds"]
        for key in keys:
            head += [self.ablation.label(key)] + (
                [f"{self.ablation.label(key)}, the paper's"] if has_paper[key] else []
            )
        lines = [" | ".join(head), " | ".join("---" for _ in head)]
        for row in self.rows:
            cells = [row.label + (f" ({row.note})" if row.note else ""), str(self.seeds(row.name))]
            for key in keys:
                cells.append(_cell(self.estimate(row.name, key)))
                if has_paper[key]:
                    cells.append(f"{row.paper[key]:g}" if key in row.paper else DASH)
            lines.append(" | ".join(cell.replace("|", "/") for cell in cells))
        parts = [f"# {self.ablation.title}", "\n".join(f"| {line} |" for line in lines), self._legend()]
        return "\n\n".join([*parts, *self._changes(), *self._findings_text()]) + "\n"

    def _changes(self) -> list[str]:
        """What training changed: the prompts' own spread, which all rows share, is gone from these intervals."""
        others = [row for row in self.rows if row.name != self.ablation.initial]
        if not self.has_initial or not others:
            return []
        keys = [metric["metric"] for metric in self.metrics]
        lines = [" | ".join(["row", *map(self.ablation.label, keys)]), " | ".join("---" for _ in ["row", *keys])]
        for row in others:
            cells = [row.label, *(_cell(self.change(row.name, key), "+") for key in keys)]
            lines.append(" | ".join(cell.replace("|", "/") for cell in cells))
        title = "## Change from the initial row, paired over prompts"
        return [title + "\n\n" + "\n".join(f"| {line} |" for line in lines)]

    def _legend(self) -> str:
        units = "; ".join(
            f"{self.ablation.label(m['metric'])}: {_times(self.ablation.factor(m['metric']))}{m['unit'] or 'no unit'}"
            for m in self.metrics
        )
        text = f"Means with 95% intervals (bootstrap over prompts and seeds). Units: {units}."
        if any(row.paper for row in self.rows):
            text += (
                " Columns named \"the paper's\" are the paper's own figures, measured by its authors on their models."
            )
        if self.missing:
            text += f" Not finished: {', '.join(self.missing)}."
        return text

    def _findings_text(self) -> list[str]:
        parts = []
        if self.findings:
            lines = [f"- **{f.outcome}**: {f.claim.text}. {f.detail[0].upper()}{f.detail[1:]}." for f in self.findings]
            parts.append("## Claims\n\n" + "\n".join(lines))
        if self.equal:
            head = "| metric | reward gained | first | second | first minus second |\n| --- | --- | --- | --- | --- |"
            lines = []
            for e in self.equal:
                scaled, factor = self.ablation.factor(e.metric), self.ablation.factor(e.reward)
                difference = Estimate(*(v * scaled for v in (e.difference.value, e.difference.low, e.difference.high)))
                lines.append(
                    f"| {self.ablation.label(e.metric)} | {self.ablation.label(e.reward)} {e.gain * factor:+.4g} "
                    f"| {e.first}: {e.values[0] * scaled:.4g} | {e.second}: {e.values[1] * scaled:.4g} "
                    f"| {_cell(difference, '+')} |"
                )
            parts.append("## At equal reward gained\n\n" + head + "\n" + "\n".join(lines))
        return parts

    def _equal(self) -> list[EqualReward]:
        """Every metric at equal trained reward, for each pair of frontiers that is measured."""
        frontiers = [f for f in self.ablation.frontiers if all(name in self.data for name in f.rows)]
        reward = next((claim.at_equal for claim in self.ablation.claims if claim.at_equal), None)
        if reward is None or not self.has_initial:
            return []
        keys = [m["metric"] for m in self.metrics if m["metric"] != reward and m["metric"] in self._with_prompts()]
        pairs = [(a, b) for i, a in enumerate(frontiers) for b in frontiers[i + 1 :]]
        found = [equal_reward(self.boot, self.ablation.initial, a, b, reward, key) for a, b in pairs for key in keys]
        return [entry for entries in found for entry in entries]

    def _with_prompts(self) -> set[str]:
        return set.intersection(*(set(row.values) for row in self.data.values())) if self.data else set()

    def _csv(self) -> str:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["row", "label", "metric", "mean", "low", "high", "seeds", "seed_sd", "paper"])
        for row in self.rows:
            for metric in self.metrics:
                key = metric["metric"]
                e = self.estimate(row.name, key)
                numbers = [_blank(v) for v in (e.value, e.low, e.high)]
                spread = _blank(self._seed_sd(row.name, key))
                paper = row.paper.get(key, "")
                writer.writerow([row.name, row.label, key, *numbers, self.seeds(row.name), spread, paper])
        return buffer.getvalue()

    def _json(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            measured = {}
            for metric in self.metrics:
                key = metric["metric"]
                entry: dict[str, Any] = asdict(self.boot.estimate(row.name, key))
                entry |= {"by_seed": self.data[row.name].by_seed(key), "paper": row.paper.get(key)}
                if self.has_initial:
                    entry["from_initial"] = asdict(self.boot.difference(row.name, self.ablation.initial, key))
                measured[key] = entry
            rows.append({"name": row.name, "label": row.label, "note": row.note, "seeds": self.seeds(row.name)}
                        | {"metrics": measured})  # fmt: skip
        return {
            "title": self.ablation.title, "scale_unit": self.ablation.scale_unit, "metrics": self.metrics,
            "rows": rows, "missing": self.missing,
            "claims": [{"text": f.claim.text, "outcome": f.outcome, "detail": f.detail,
                        "estimates": [asdict(e) for e in f.estimates]} for f in self.findings],
            "equal_reward": [asdict(e) for e in self.equal],
        }  # fmt: skip

    def _seed_sd(self, row: str, metric: str) -> float:
        values = self.data[row].by_seed(metric)
        return float(np.std(values, ddof=1) * self.ablation.factor(metric)) if len(values) > 1 else math.nan


def _cell(estimate: Estimate, sign: str = "") -> str:
    if math.isnan(estimate.value):
        return DASH
    text = f"{estimate.value:{sign}.4g}"
    return text if math.isnan(estimate.low) else f"{text} [{estimate.low:{sign}.4g}, {estimate.high:{sign}.4g}]"


def _blank(value: float) -> str:
    return repr(value) if math.isfinite(value) else ""


def _times(factor: float) -> str:
    return "" if factor == 1 else f"{factor:g} x "
