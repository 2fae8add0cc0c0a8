"""The ablation's table: measured values with intervals, the paper's own figures marked as such beside them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from rlhf_t2i.evaluation import results
from rlhf_t2i.evaluation.results import Results, dumps, markdown_table
from rlhf_t2i.tools.ablation.analysis import (
    Bootstrap,
    EqualReward,
    Estimate,
    Finding,
    VariantData,
    decide,
    equal_reward,
)
from rlhf_t2i.tools.ablation.execute import Task
from rlhf_t2i.tools.ablation.schema import Ablation
from rlhf_t2i.utils import files
from rlhf_t2i.utils.numbers import DASH


class Table:
    """The results of an ablation.

    Args:
        ablation: The recipe.
        tasks: Its rows and seeds; unfinished ones are left out.
    """

    def __init__(self, ablation: Ablation, tasks: Sequence[Task]) -> None:
        self.ablation, self.tasks = ablation, tasks
        self.results: dict[str, list[Results]] = {}
        for task in tasks:
            if task.finished and (found := results.read(task.evaluated)):
                self.results.setdefault(task.variant.name, []).append(found)
        self.data = {name: VariantData(name, _matrices(seeds)) for name, seeds in self.results.items()}
        self.metrics = {m.key: m for seeds in self.results.values() for m in seeds[0].metrics.values()}
        self.boot = Bootstrap(self.data)
        self.rows = [row for row in ablation.rows if row.name in self.data]
        self.missing = [task.name for task in tasks if not task.finished]
        self.findings: list[Finding] = [decide(claim, ablation, self.boot) for claim in ablation.claims]
        self.equal: list[EqualReward] = self._equal()

    def estimate(self, row: str, metric: str) -> Estimate:
        """A row's mean, in the unit it is shown in."""
        return self.boot.estimate(row, metric).times(self.ablation.factor(metric))

    def change(self, row: str, metric: str) -> Estimate:
        """A row's mean less the initial row's, paired over prompts, in the unit it is shown in."""
        return self.boot.difference(row, self.ablation.initial, metric).times(self.ablation.factor(metric))

    @property
    def has_initial(self) -> bool:
        """Whether the row that changes are computed from is finished."""
        return self.ablation.initial in self.data

    def seeds(self, row: str) -> int:
        """How many seeds of a row are finished."""
        return len(self.results[row])

    def write(self, out: Path) -> None:
        """Write ``table.md``, ``table.csv`` and ``table.json``; the same results give the same bytes."""
        files.write_atomic(out / "table.md", self.markdown())
        files.write_atomic(out / "table.csv", self._csv())
        files.write_atomic(out / "table.json", dumps(self._json()))

    def markdown(self) -> str:
        """The table in Markdown."""
        has_paper = {key: any(key in row.paper for row in self.rows) for key in self.metrics}
        head = ["row", "seeds"]
        for key in self.metrics:
            label = self.ablation.label(key)
            head += [label, f"{label}, the paper's"] if has_paper[key] else [label]
        lines = [head, ["---"] * len(head)]
        for row in self.rows:
            cells = [row.label + (f" ({row.note})" if row.note else ""), str(self.seeds(row.name))]
            for key in self.metrics:
                cells.append(_cell(self.estimate(row.name, key)))
                if has_paper[key]:
                    cells.append(f"{row.paper[key]:g}" if key in row.paper else DASH)
            lines.append(cells)
        parts = [f"# {self.ablation.title}\n", markdown_table(lines), self._legend() + "\n"]
        return "\n".join([*parts, *self._changes(), *self._claims(), *self._equal_reward()])

    def _changes(self) -> list[str]:
        """What training changed: these intervals are free of the spread between prompts, which all rows share."""
        others = [row for row in self.rows if row.name != self.ablation.initial]
        if not self.has_initial or not others:
            return []
        lines = [["row", *map(self.ablation.label, self.metrics)], ["---"] * (1 + len(self.metrics))]
        lines += [[row.label, *(_cell(self.change(row.name, key), "+") for key in self.metrics)] for row in others]
        return ["## Change from the initial row, paired over prompts\n", markdown_table(lines)]

    def _legend(self) -> str:
        units = "; ".join(
            f"{self.ablation.label(key)}: {_times(self.ablation.factor(key))}{metric.unit or 'no unit'}"
            for key, metric in self.metrics.items()
        )
        text = f"Means with 95% intervals (bootstrap over prompts and seeds). Units: {units}."
        if any(row.paper for row in self.rows):
            text += (
                " Columns named \"the paper's\" are the paper's own figures, measured by its authors on their models."
            )
        if self.missing:
            text += f" Not finished: {', '.join(self.missing)}."
        return text

    def _claims(self) -> list[str]:
        lines = [f"- **{f.outcome}**: {f.claim.text}. {f.detail[0].upper()}{f.detail[1:]}.\n" for f in self.findings]
        return ["## Claims\n", "".join(lines)] if lines else []

    def _equal_reward(self) -> list[str]:
        lines = [["metric", "reward gained", "first", "second", "first minus second"], ["---"] * 5]
        for e in self.equal:
            scale, gain = self.ablation.factor(e.metric), e.gain * self.ablation.factor(e.reward)
            values = [f"{name}: {v * scale:.4g}" for name, v in zip((e.first, e.second), e.values, strict=True)]
            labels = [self.ablation.label(e.metric), f"{self.ablation.label(e.reward)} {gain:+.4g}"]
            lines.append([*labels, *values, _cell(e.difference.times(scale), "+")])
        return ["## At equal reward gained\n", markdown_table(lines)] if self.equal else []

    def _equal(self) -> list[EqualReward]:
        """Every metric at equal trained reward, for each pair of frontiers that is measured."""
        frontiers = [f for f in self.ablation.frontiers if all(name in self.data for name in f.rows)]
        reward = next((claim.at_equal for claim in self.ablation.claims if claim.at_equal), None)
        if reward is None or not self.has_initial:
            return []
        keys = [key for key in self.metrics if key != reward and self._by_prompt(key)]
        pairs = [(a, b) for i, a in enumerate(frontiers) for b in frontiers[i + 1 :]]
        found = [equal_reward(self.boot, self.ablation.initial, a, b, reward, key) for a, b in pairs for key in keys]
        return [entry for entries in found for entry in entries]

    def _by_prompt(self, metric: str) -> bool:
        """Whether every row has one value of a metric per prompt."""
        return all(metric in row.values and row.values[metric].shape[1] > 1 for row in self.data.values())

    def _csv(self) -> str:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["row", "label", "metric", "mean", "low", "high", "seeds", "seed_sd", "paper"])
        for row in self.rows:
            for key in self.metrics:
                e = self.estimate(row.name, key)
                numbers = [_blank(v) for v in (e.value, e.low, e.high)]
                spread = _blank(self._seed_sd(row.name, key))
                paper = row.paper.get(key, "")
                writer.writerow([row.name, row.label, key, *numbers, self.seeds(row.name), spread, paper])
        return buffer.getvalue()

    def _json(self) -> dict[str, object]:
        rows = []
        for row in self.rows:
            measured = {}
            for key in self.metrics:
                entry: dict[str, object] = asdict(self.boot.estimate(row.name, key))
                entry |= {"by_seed": self.data[row.name].by_seed(key), "paper": row.paper.get(key)}
                if self.has_initial:
                    entry["from_initial"] = asdict(self.boot.difference(row.name, self.ablation.initial, key))
                measured[key] = entry
            rows.append({"name": row.name, "label": row.label, "note": row.note, "seeds": self.seeds(row.name)}
                        | {"metrics": measured})  # fmt: skip
        return {
            "title": self.ablation.title, "scale_unit": self.ablation.scale_unit,
            "metrics": [{"metric": m.key, "unit": m.unit, "higher_is_better": m.higher_is_better}
                        for m in self.metrics.values()],
            "rows": rows, "missing": self.missing,
            "claims": [{"text": f.claim.text, "outcome": f.outcome, "detail": f.detail,
                        "estimates": [asdict(e) for e in f.estimates]} for f in self.findings],
            "equal_reward": [asdict(e) for e in self.equal],
        }  # fmt: skip

    def _seed_sd(self, row: str, metric: str) -> float:
        values = self.data[row].by_seed(metric)
        return float(np.std(values, ddof=1) * self.ablation.factor(metric)) if len(values) > 1 else math.nan


def _matrices(seeds: Sequence[Results]) -> dict[str, np.ndarray]:
    """Per metric [S, P], or [S, 1] for a number of the whole set."""
    keys = seeds[0].metrics
    found = {key: [seed.metrics[key].by_prompt or [seed.metrics[key].value] for seed in seeds] for key in keys}
    return {key: np.array(rows, dtype=np.float64) for key, rows in found.items()}


def _cell(estimate: Estimate, sign: str = "") -> str:
    if math.isnan(estimate.value):
        return DASH
    text = f"{estimate.value:{sign}.4g}"
    return text if math.isnan(estimate.low) else f"{text} [{estimate.low:{sign}.4g}, {estimate.high:{sign}.4g}]"


def _blank(value: float) -> str:
    return repr(value) if math.isfinite(value) else ""


def _times(factor: float) -> str:
    return "" if factor == 1 else f"{factor:g} x "
