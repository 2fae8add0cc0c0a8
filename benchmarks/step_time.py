"""Time one DI* step by role and phase, in both placements, side by side in one run and beside the plan.

``python benchmarks/step_time.py recipes/quickstart.yaml --steps 20``

The placements take turns, step by step, so that a noisy machine disturbs all alike; medians over the steps are shown.
Planned seconds come from the networks' own, measured in this process before and after the steps with the placement's
threads, alone and beside as many processes as it has (``rlhf-t2i plan --device here``).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections import defaultdict
from dataclasses import astuple, replace
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
from rlhf_t2i.recipe.placement import check_placement
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.stopwatch import WAIT
from rlhf_t2i.tools.planning import calibration, graph, plan
from rlhf_t2i.tools.planning.speed import Measured, Passes
from rlhf_t2i.training.overlap import Updates

WARM_UP = 3
ROLES = "roles: [learner, generator, assistant, reference, reward]"
ONE_GROUP = f"placement={{mode: ray, groups: {{all: {{{ROLES}}}}}}}"
TWO_GROUPS = (
    "placement={mode: ray, groups: {train: {roles: [learner, generator, reference], threads: 1}, "
    "serve: {roles: [assistant, reward], threads: 1}}}"
)
REPLICAS = f"placement={{mode: ray, groups: {{all: {{{ROLES}, devices: 2, threads: 1}}}}}}"


def cores() -> int:
    """Threads of a process that is alone."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


class Timed:
    """One placement and what its steps took."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        self.name, self.recipe = name, recipe
        self.cluster: Cluster
        if recipe.placement.mode == "local":
            torch.set_num_threads(cores())
            self.cluster = LocalCluster(recipe)
        else:
            from rlhf_t2i.cluster.ray_cluster import RayCluster

            self.cluster = RayCluster(recipe)
        self._updates = Updates(recipe, self.cluster)
        read = prompts.read(recipe.data.prompts)  # both updates have prompts of their own, as in training
        self._streams = [prompts.PromptStream(read, recipe.seed, role) for role in ("assistant", "generator")]
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.roles: defaultdict[str, list[float]] = defaultdict(list)
        self.bytes: list[int] = []
        self._steps = 0

    def step(self, record: bool) -> None:
        """One assistant round and one generator step."""
        size = self.recipe.optimization.batch_size
        samples, batch = (stream.batch(self._steps * size, size) for stream in self._streams)
        self.cluster.readings()
        began = time.perf_counter()
        self._updates.assistant({self._steps: samples}, (self._steps, batch))
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


def measure(runs: list[Timed]) -> list[Measured]:
    """The speed of this machine's networks, as the processes of each placement run them."""
    return [calibration.measure(run.recipe, plan.make(run.recipe).batch["learner"]["micro"]) for run in runs]


def mean(before: Measured, after: Measured) -> Measured:
    """Of what was measured before the steps and after them."""
    image = {
        part: Passes(*(0.5 * (x + y) for x, y in zip(astuple(one), astuple(after.image[part]), strict=True)))
        for part, one in before.image.items()
    }
    return replace(
        before,
        image=image,
        text=0.5 * (before.text + after.text),
        crowded=0.5 * (before.crowded + after.crowded),
    )


def planned(run: Timed, speed: Measured) -> dict[str, float]:
    """Seconds of the phases, and of each role on all of its devices, as planned."""
    step = plan.step_time(run.recipe, speed)
    devices = {name: group.devices for name, group in run.recipe.placement.groups.items()}
    placed = check_placement(run.recipe)
    apart = placed["assistant"][0] != placed["generator"][0]
    found = {"assistant phase": step.assistant, "generator phase": step.generator, "step": step.step}
    for span in step.timeline.spans:
        call = span.call
        if not call.computes:
            continue
        name = "reward" if call.role.startswith(("reward", "decoder")) else call.role
        if name == graph.TEXT:  # whoever asks first encodes
            name = encoder(call.name, apart)
        several = 1 if run.recipe.placement.mode == "local" else devices[call.group or ""]
        found[name] = found.get(name, 0.0) + several * span.seconds
    return found


def encoder(call: str, apart: bool) -> str:
    """The role that encodes the prompts of a call; ``apart``: assistant and generator are in different groups."""
    if call.startswith("assistant"):
        return "generator" if apart and not call.endswith("again") else "assistant"
    return "learner" if call.endswith("encode") else "assistant"


def table(runs: list[Timed], speeds: list[Measured]) -> list[list[str]]:
    """Rows of the result: medians, images a second, overhead against the first placement, bytes an image."""
    rows: list[list[str]] = []
    plans = [planned(run, speed) for run, speed in zip(runs, speeds, strict=True)]

    def beside(name: str, values: list[float | None]) -> list[str]:
        """Measured, and in brackets planned."""
        return [
            "-" if value is None else f"{value:.3f} ({told[name]:.3f})" if name in told else f"{value:.3f}"
            for value, told in zip(values, plans, strict=True)
        ]

    def row(name: str, cells: list[str]) -> None:
        rows.append([name, *cells])

    phases = ("assistant phase", "generator phase", "step")
    median: Any = statistics.median
    for phase in phases:
        row(f"{phase}, s (planned)", beside(phase, [median(run.seconds[phase]) for run in runs]))
    for role in ("learner", "generator", "assistant", "reference", "reward", "waiting for others"):
        row(f"  busy: {role}, s", beside(role, [median(run.roles[role]) if run.roles[role] else None for run in runs]))
    size = runs[0].recipe.optimization.batch_size
    row("images a second", [f"{2 * size / median(run.seconds['step']):.1f}" for run in runs])
    ratios = (median(run.seconds["step"]) / told["step"] for run, told in zip(runs, plans, strict=True))
    row("step, measured / planned", [f"{ratio:.2f}" for ratio in ratios])
    base = median(runs[0].seconds["step"])
    row("against local, %", [f"{100 * (median(run.seconds['step']) / base - 1):+.1f}" for run in runs])
    row("bytes moved an image", [f"{median(run.bytes) / (2 * size):.0f}" for run in runs])
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="placements whose name contains this")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of CPU of one thread, local only: for a machine that others use",
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    if args.cpu_time:
        args.only = "local"
        os.environ["OMP_NUM_THREADS"] = "1"
        time.perf_counter = time.process_time
    variants = {
        "local": ["placement=local"],
        "ray, one process": [ONE_GROUP],
        "ray, two one-thread processes with all roles": [REPLICAS],
        "ray, two groups of roles": [TWO_GROUPS],
    }
    variants = {name: more for name, more in variants.items() if args.only in name}
    if any(name != "local" for name in variants):
        from rlhf_t2i.cluster.connect import start_local_ray

        start_local_ray(8)  # all Ray placements share it
    runs = [Timed(name, reading.load(args.recipe, [*args.overrides, *more])) for name, more in variants.items()]
    before = measure(runs)
    for number in track(range(WARM_UP + args.steps), description="steps"):
        for run in runs:
            run.step(record=number >= WARM_UP)
    speeds = [mean(first, then) for first, then in zip(before, measure(runs), strict=True)]
    rows = table(runs, speeds)
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {cores()} threads ({platform.machine()})"
    )
    conditions = (
        f"{args.recipe.name}, batch {runs[0].recipe.optimization.batch_size}, median of {args.steps} steps "
        f"taken in turns, {device}, torch {torch.__version__}"
        f"{', seconds of CPU' if args.cpu_time else ''}"
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
