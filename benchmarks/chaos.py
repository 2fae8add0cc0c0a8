"""Kill processes and nodes of runs in every phase and compare how the runs end with undisturbed ones, bit for bit.

``python benchmarks/chaos.py --local 70 --ray 24 --nodes 6 --seed 1``, or ``make chaos``. Three kinds of runs on tiny
random models:

- in one process (``placement: local``): the driver is killed,
- over Ray, learner, assistant and the other roles in a process each: one of these, the driver, Ray's raylet or its
  control store (``gcs_server``) is killed,
- in a Ray cluster of several nodes on this machine: the whole node of a role.

A run suffers several kills, at moments drawn from the seed, in phases from the start to the report. One that ends is
continued with ``--resume``, as its user would.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import yaml
from nodes import Nodes
from random_models import build, small
from rich.console import Console
from rich.table import Table
from watched import Watched, marked, shared_memory

LINGER_S = 70.0  # two of Ray's own processes stay for a minute when a driver is killed
LAUNCH_TIMEOUT_S = 400.0  # a run that takes longer hangs
GROUPS = {"learner": "train", "assistant": "model", "server": "serve"}
PLACEMENT = (
    "{mode: ray, max_restarts: 1000, groups: {train: {roles: [learner], threads: 1}, model: {roles: [assistant], "
    "threads: 1}, serve: {roles: [generator, reference, reward], threads: 1}}}"
)
LOCAL_PHASES = (
    "start-up", "evaluation before", "training", "training", "evaluation after", "export", "report",
)  # fmt: skip
RAY_PHASES = ("start-up", "training", "training", "training", "evaluation after", "export")


@dataclass
class Kill:
    """One kill.

    Attributes:
        kind: ``local``, ``ray`` or ``nodes``.
        victim: A role's process or node, ``driver``, ``raylet`` or ``gcs_server``.
        phase: What the run did when it was hit.
        resumed: Whether it ended and was started again with ``--resume``; else it went on by itself.
        lost: Seconds until it was past the point at which it was hit.
        survived: Whether the run ended like the undisturbed one.
        said: Last line of a run that ended though its driver was not killed.
    """

    kind: str
    victim: str
    phase: str
    resumed: bool = False
    lost: float = 0.0
    survived: bool = False
    said: str = ""

    @property
    def row(self) -> tuple[str, str]:
        """Of the table: the phase distinguishes the kills of one victim, the victims those of Ray."""
        return (self.kind, f"driver: {self.phase}" if self.kind == "local" else self.victim)


@dataclass
class Chaos:
    """Runs of one kind that suffer kills.

    Attributes:
        kind: ``local``, ``ray`` or ``nodes``.
        arguments: Of ``rlhf-t2i run``.
        victims: Who is killed, in turn.
        phases: In which, drawn; of ``local`` all in order.
        nodes: The cluster, for ``nodes``.
    """

    kind: str
    out: Path
    arguments: Sequence[str]
    victims: Sequence[str]
    phases: Sequence[str]
    draw: random.Random
    console: Console
    nodes: Nodes | None = None
    kills: list[Kill] = field(default_factory=list)

    def rounds(self, count: int) -> list[str]:
        """Runs until so many kills have hit; returns what they left behind."""
        if not count:
            return []
        shared = set(Path("/dev/shm").iterdir())
        undisturbed = Watched(self.out / f"{self.kind}_undisturbed", self.arguments)
        self._seconds = undisturbed.time_phases()
        self._expected = undisturbed.fingerprint()
        self.console.print(f"{self.kind}: undisturbed {sum(self._seconds.values()):.0f} s")
        number = 0
        while len(self.kills) < count:
            self._run(f"{self.kind}_{number:03d}", count - len(self.kills))
            number += 1
        return self._left_behind(shared)

    def _left_behind(self, shared: set[Path]) -> list[str]:
        """Processes of these runs that stay although they had time to end, and their files in shared memory."""
        deadline = time.monotonic() + LINGER_S
        own = set() if self.nodes is None else set(self.nodes.processes())
        while (rest := set(marked()) - own) and time.monotonic() < deadline:
            time.sleep(1)
        left = [f"process {process.pid} {process.name()}" for process in rest]
        return left + shared_memory(shared)

    def _run(self, name: str, most: int) -> None:
        """One run and its kills; appends those that hit."""
        run, hits = Watched(self.out / name, self.arguments), list[Kill]()
        phases = (
            self.phases if self.kind == "local" else sorted(self.draw.sample(self.phases, 3), key=LOCAL_PHASES.index)
        )
        for phase in phases[:most]:
            victim = self.victims[(len(self.kills) + len(hits)) % len(self.victims)]
            hit = self._kill(run, victim, phase)
            if hit is None:
                break
            hits.append(hit)
        self._finish(run, hits)
        same = run.fingerprint() == self._expected
        for hit in hits:
            hit.survived = same
        self.kills += hits
        self.console.print(f"{name}: {'equal bit for bit' if same else f'DIFFERENT, see {run.log}'}")
        if not same and not hits:
            raise SystemExit(f"{name} failed without a kill")

    def _kill(self, run: Watched, victim: str, phase: str) -> Kill | None:
        """Wait for a moment in a phase, kill, and wait until the run is past that point; None where it ended before."""
        within = self.draw.uniform(0, max(self._seconds[phase], 0.05))
        after, deadline = run.steps() + self.draw.randint(0, 1), time.monotonic() + LAUNCH_TIMEOUT_S
        while run.phase() != phase or (phase == "training" and run.steps() < after):
            if run.ended() and run.process.exitcode == 0:
                return None
            if run.phase() == "training" and phase in ("start-up", "evaluation before"):
                phase = "training"  # of a run that was continued
            self._check(run, deadline)
            time.sleep(0.005)
        time.sleep(within)
        position = run.position()
        if run.ended() or not strike(victim, run, self.nodes):
            return None
        hit, struck = Kill(self.kind, victim, run.phase()), time.monotonic()
        self.console.print(f"{run.out.name}: killed {victim} in {hit.phase}, {within:.2f} s after it began")
        while run.position() <= position:
            if run.ended():
                hit.resumed = True
                hit.said = "" if victim == "driver" else (run.said() or [""])[-1]
                run.start()
            self._check(run, struck + LAUNCH_TIMEOUT_S)
            time.sleep(0.02)
        hit.lost = round(time.monotonic() - struck, 2)
        return hit

    def _finish(self, run: Watched, hits: Sequence[Kill]) -> None:
        """Wait for the end; a run that stops after a kill is continued once."""
        deadline = time.monotonic() + LAUNCH_TIMEOUT_S
        while not run.ended():
            self._check(run, deadline)
            time.sleep(0.05)
        if run.process.exitcode and hits and not hits[-1].resumed:
            hits[-1].resumed, hits[-1].said = True, run.said()[-1]
            run.start()
            self._finish(run, hits)

    def _check(self, run: Watched, deadline: float) -> None:
        if time.monotonic() > deadline:
            run.process.kill()
            raise SystemExit(f"{run.out.name} hangs: see {run.log}")


def strike(victim: str, run: Watched, nodes: Nodes | None) -> bool:
    """SIGKILL whoever it is; False where it was not there (between two restarts)."""
    if victim == "driver":
        run.process.kill()
        run.process.join()
        return True
    if nodes is not None:
        process = _find(victim, nodes.processes())
        return process is not None and nodes.kill_under(process)
    deadline = time.monotonic() + 60  # in start-up it may come only later
    while not run.ended() and time.monotonic() < deadline:
        try:
            below = psutil.Process(run.pid).children(recursive=True)
        except psutil.NoSuchProcess:  # it has just ended
            return False
        process = _find(victim, below)
        if process is not None:
            with suppress(psutil.NoSuchProcess):  # it has just ended: look for the next one
                process.send_signal(signal.SIGKILL)
                return True
        time.sleep(0.05)
    return False


def _find(victim: str, among: Iterable[psutil.Process]) -> psutil.Process | None:
    """The process of a group of roles, or Ray's own by its name."""
    for process in among:
        try:
            if victim in GROUPS and process.environ().get("RLHF_T2I_PROCESS") == f"{GROUPS[victim]}/0":
                return process
            if victim not in GROUPS and process.name() == victim:
                return process
        except psutil.Error:
            continue
    return None


def write_recipe(folder: Path) -> Path:
    """Tiny random models, and a recipe that trains them for eight steps."""
    overrides = build(folder / "models", small(16, 8, 32), "cpu", torch.float32)
    sections: dict[str, dict[str, object]] = {}
    for key, value in overrides.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    rates = {"lr": 1e-3, "eps": 1e-4}
    recipe = sections | {
        "steps": 8,
        "algorithm": sections["algorithm"] | {"assistant_steps": 2, "cfg": {"guidance_scale": 3.0}},
        "optimization": {"batch_size": 4, "generator": rates, "assistant": rates, "ema": {"half_life_kimg": 0.01}},
        "checkpoints": {"every": 2},
        "evaluation": {"images": 4, "images_per_prompt": 2, "batch_size": 2},
        "logging": {"samples_every": 4, "sample_count": 2, "watch_every": 3},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), "utf-8")
    return file


def main() -> int:
    """Kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", type=int, default=70, help="kills of runs in one process")
    parser.add_argument("--ray", type=int, default=24, help="kills of processes over Ray, of the driver and Ray's own")
    parser.add_argument("--nodes", type=int, default=6, help="kills of whole Ray nodes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    console, draw, out = Console(), random.Random(args.seed), args.out.resolve()
    recipe = str(write_recipe(out))
    over_ray = [recipe, "--set", f"placement={PLACEMENT}"]
    local = Chaos("local", out, [recipe, "--set", "placement=local"], ["driver"], LOCAL_PHASES, draw, console)
    others = [*GROUPS, "driver", "raylet", "gcs_server"]
    processes = Chaos("ray", out, over_ray, others, RAY_PHASES, draw, console)
    began = time.monotonic()
    left = {"local": local.rounds(args.local), "ray": processes.rounds(args.ray)}
    kills = local.kills + processes.kills
    if args.nodes:
        nodes = Nodes(len(GROUPS) + 1)
        try:
            joined = [*over_ray, "--address", nodes.address]
            whole = Chaos("nodes", out, joined, list(GROUPS), ["training"] * 3, draw, console, nodes)
            left["nodes"] = whole.rounds(args.nodes)
            kills += whole.kills
        finally:
            nodes.close()
    console.print(f"{len(kills)} kills in {(time.monotonic() - began) / 60:.0f} minutes")
    return report(kills, left, out, console)


def report(kills: Sequence[Kill], left: dict[str, list[str]], out: Path, console: Console) -> int:
    """The table, and ``chaos.json``; 1 if a kill was not survived or something was left behind."""
    table = Table(title="Equal: the run ended with the undisturbed run's model, scores and metrics, bit for bit")
    columns = ("run", "killed", "kills", "equal", "resumed", "s lost, median", "most", "left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("run", "killed") else "right")
    for kind, things in left.items():
        of_kind = [kill for kill in kills if kill.kind == kind]
        for row in dict.fromkeys(sorted(kill.row for kill in of_kind)):
            table.add_row(*row, *_cells([kill for kill in of_kind if kill.row == row]), "")
        if of_kind:
            table.add_row(kind, "all", *_cells(of_kind), str(len(things)), end_section=True)
    console.print(table)
    for thing in [thing for things in left.values() for thing in things]:
        console.print(f"left behind: {thing}")
    for said in dict.fromkeys(kill.said for kill in kills if kill.said):
        console.print(f"ended with: {said}")
    text = json.dumps({"kills": [vars(kill) for kill in kills], "left_behind": left}, indent=1)
    (out / "chaos.json").write_text(text + "\n", "utf-8")
    return int(not all(kill.survived for kill in kills) or any(left.values()))


def _cells(kills: Sequence[Kill]) -> list[str]:
    lost = [kill.lost for kill in kills]
    survived, resumed = sum(kill.survived for kill in kills), sum(kill.resumed for kill in kills)
    return [str(len(kills)), str(survived), str(resumed), f"{statistics.median(lost):.1f}", f"{max(lost):.1f}"]


if __name__ == "__main__":
    sys.exit(main())
