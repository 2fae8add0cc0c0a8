"""Time one DI* step by role and phase, in both placements, side by side in one run.

``python benchmarks/step_time.py recipes/quickstart.yaml --steps 20``

The placements take turns, step by step, so that a noisy machine disturbs all alike; medians over the steps are shown.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rlhf_t2i.algorithm import prompts
from rlhf_t2i.cluster.base import Cluster
from rlhf_t2i.cluster.local import LocalCluster
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.stopwatch import WAIT
from rlhf_t2i.training.overlap import Updates

WARM_UP = 3
ROLES = "roles: [learner, generator, assistant, reference, reward]"
ONE_GROUP = f"placement={{mode: ray, groups: {{all: {{{ROLES}}}}}}}"
TWO_GROUPS = (
    "placement={mode: ray, groups: {train: {roles: [learner, generator, reference], threads: 1}, "
    "serve: {roles: [assistant, reward], threads: 1}}}"
)
REPLICAS = f"placement={{mode: ray, groups: {{all: {{{ROLES}, devices: 2, threads: 1}}}}}}"


class Timed:
    """One placement and what its steps took."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        self.name, self.recipe = name, recipe
        self.cluster: Cluster
        if recipe.placement.mode == "local":
            torch.set_num_threads(os.cpu_count() or 1)
            self.cluster = LocalCluster(recipe)
        else:
            from rlhf_t2i.cluster.ray_cluster import RayCluster

            self.cluster = RayCluster(recipe)
        self._updates = Updates(recipe, self.cluster)
        self._stream = prompts.PromptStream(prompts.read(recipe.data.prompts), recipe.seed, "benchmark")
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.roles: defaultdict[str, list[float]] = defaultdict(list)
        self.bytes: list[int] = []
        self._steps = 0

    def step(self, record: bool) -> None:
        """One assistant round and one generator step."""
        size = self.recipe.optimization.batch_size
        batch = self._stream.batch(self._steps * size, size)
        self.cluster.readings()
        began = time.perf_counter()
        self._updates.assistant({self._steps: batch}, (self._steps, batch))
        middle = time.perf_counter()
        self._updates.generator(self._steps, batch)
        ended = time.perf_counter()
        self._steps += 1
        if not record:
            return
        self.seconds["assistant phase"].append(middle - began)
        self.seconds["generator phase"].append(ended - middle)
        self.seconds["step"].append(ended - began)
        spent: defaultdict[str, float] = defaultdict(float)
        sent = 0
        for spent_here in self.cluster.readings().values():
            sent += spent_here.sent
            for role, seconds in spent_here.seconds.items():
                spent["waiting for others" if role == WAIT else role] += seconds
        for role, seconds in spent.items():
            self.roles[role].append(seconds)
        self.bytes.append(sent)


def table(runs: list[Timed]) -> list[list[str]]:
    """Rows of the result: medians, images a second, overhead against the first placement, bytes an image."""
    rows: list[list[str]] = []

    def row(name: str, cells: list[str]) -> None:
        rows.append([name, *cells])

    phases = ("assistant phase", "generator phase", "step")
    median: Any = statistics.median
    for phase in phases:
        row(f"{phase}, s", [f"{median(run.seconds[phase]):.3f}" for run in runs])
    for role in ("learner", "generator", "assistant", "reference", "reward", "waiting for others"):
        row(f"  busy: {role}, s", [f"{median(run.roles[role]):.3f}" if run.roles[role] else "-" for run in runs])
    size = runs[0].recipe.optimization.batch_size
    row("images a second", [f"{2 * size / median(run.seconds['step']):.1f}" for run in runs])
    base = median(runs[0].seconds["step"])
    row("against local, %", [f"{100 * (median(run.seconds['step']) / base - 1):+.1f}" for run in runs])
    row("bytes moved an image", [f"{median(run.bytes) / (2 * size):.0f}" for run in runs])
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    variants = {
        "local": ["placement=local"],
        "ray, one process": [ONE_GROUP],
        "ray, two one-thread processes with all roles": [REPLICAS],
        "ray, two groups of roles": [TWO_GROUPS],
    }
    from rlhf_t2i.cluster.connect import start_local_ray

    start_local_ray(8)  # both Ray placements share it
    runs = [Timed(name, reading.load(args.recipe, [*args.overrides, *more])) for name, more in variants.items()]
    for number in track(range(WARM_UP + args.steps), description="steps"):
        for run in runs:
            run.step(record=number >= WARM_UP)
    rows = table(runs)
    cores = os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {cores} cores ({platform.machine()})"
    conditions = (
        f"{args.recipe.name}, batch {runs[0].recipe.optimization.batch_size}, median of {args.steps} steps "
        f"taken in turns, {device}, torch {torch.__version__}"
    )
    shown = Table(title=conditions)
    for column in ("", *variants):
        shown.add_column(column, justify="right" if column else "left")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    if args.markdown:
        header = f"| | {' | '.join(variants)} |\n|---|{'---:|' * len(variants)}\n"
        body = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        args.markdown.write_text(f"{conditions}\n\n{header}{body}", "utf-8")
    for run in runs:
        run.cluster.close()


if __name__ == "__main__":
    main()
