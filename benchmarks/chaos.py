"""Kill processes and nodes of a run at random moments and compare how it ends with an undisturbed run, bit for bit.

``python benchmarks/chaos.py --kills 60 --node-kills 10``, or ``make chaos``. The victim (the process of a role, or the
driver, which is then resumed; or the whole Ray node that a role runs on) and the moment after a step are drawn from the
seed; moments cover a whole step and more, so that every phase is hit. A run suffers several kills; runs are repeated
until enough were made. Whole nodes are killed in a cluster of six on this machine; a new one takes a dead one's place.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from nodes import Nodes
from rich.console import Console
from rich.table import Table

LINGER_S = 70.0  # two of Ray's own processes stay for a minute when a driver is killed
NODE = "node of the "
GROUPS = {"learner": "train", "generator": "draw", "assistant": "model", "reference": "look", "reward": "score"}
PLACEMENT = (
    "placement={mode: ray, max_restarts: 1000, groups: {"
    + ", ".join(f"{group}: {{roles: [{role}], threads: 1}}" for role, group in GROUPS.items())
    + "}}"
)
SMALL = [
    "steps=8", "checkpoints.every=2", "optimization.batch_size=4", "algorithm.assistant_steps=2",
    "evaluation={images: 4, images_per_prompt: 2}", "logging={samples_every: 100, sample_count: 2}", PLACEMENT,
]  # fmt: skip


@dataclass
class Kill:
    """Whom (a role, its whole node, or the driver), when (seconds after a step), and whether it was survived.

    Survived: the run ended like the undisturbed one.
    """

    victim: str
    moment: float
    survived: bool = False


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    """The run's command line."""
    sets = [part for setting in SMALL for part in ("--set", setting)]
    return [sys.executable, "-m", "rlhf_t2i.cli", "run", str(recipe), "--out", str(out), *sets, *more]


def fingerprint(out: Path) -> tuple[bytes, list[dict[str, object]]]:
    """The exported weights and the metrics without what depends on the machine."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    kept = [{k: v for k, v in row.items() if k not in ("timing", "memory")} for row in rows]
    return (out / "model/unet/diffusion_pytorch_model.safetensors").read_bytes(), kept


def find(role: str, among: Iterable[psutil.Process]) -> psutil.Process | None:
    """The actor of a role."""
    for process in among:
        try:
            if process.environ().get("RLHF_T2I_PROCESS") == f"{GROUPS[role]}/0":
                return process
        except psutil.Error:
            continue
    return None


def strike(victim: str, child: subprocess.Popen[bytes], nodes: Nodes | None) -> bool:
    """SIGKILL whoever it is; False where it was not there (between two restarts)."""
    if victim == "driver":
        child.kill()
        child.wait()
        return True
    if nodes is not None:
        process = find(victim.removeprefix(NODE), nodes.processes())
        return process is not None and nodes.kill_under(process)
    process = find(victim, psutil.Process(child.pid).children(recursive=True))
    if process is not None:
        process.send_signal(signal.SIGKILL)
    return process is not None


def leftovers(before: dict[str, set[object]]) -> list[str]:
    """What belongs to Ray and was not there before, once it has had its time."""
    deadline = time.monotonic() + LINGER_S
    while True:
        now = belongings()
        left = [str(thing) for kind, things in now.items() for thing in things - before[kind]]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(1)


def belongings() -> dict[str, set[object]]:
    """Ray's processes on this machine, their listening ports, and files in shared memory."""
    processes, ports = set[object](), set[object]()
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if "ray::" in line or "raylet" in line or "gcs_server" in line:
                processes.add((process.pid, line[:80]))
                listening = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
                ports |= {("port", c.laddr.port) for c in listening}
        except psutil.Error:
            continue
    return {"processes": processes, "ports": ports, "shared memory": set(Path("/dev/shm").iterdir())}


@dataclass
class Chaos:
    """Runs that suffer kills, and what they must end with."""

    recipe: Path
    out: Path
    kills_per_run: int
    draw: random.Random
    console: Console
    expected: tuple[bytes, list[dict[str, object]]]

    def rounds(self, count: int, victims: Sequence[str], nodes: Nodes | None = None) -> list[Kill]:
        """Runs until so many kills have hit; with ``nodes`` in that cluster."""
        done: list[Kill] = []
        while len(done) < count:
            chosen = self.draw.choices(victims, k=min(self.kills_per_run, count - len(done)))
            out = self.out / f"{'run' if nodes is None else 'nodes'}_{len(done):03d}"
            kills = self._one_run(out, [Kill(victim, round(self.draw.uniform(0, 3), 2)) for victim in chosen], nodes)
            same = (out / "model").is_dir() and fingerprint(out) == self.expected
            for kill in kills:
                kill.survived = same
            done += kills
            self.console.print(f"{out.name}: {'equal bit for bit' if same else f'DIFFERENT, see {out}.log'}")
            if not same and not kills:
                raise SystemExit(f"{out.name} failed without a kill: see {out}.log")
        return done

    def _one_run(self, out: Path, kills: Sequence[Kill], nodes: Nodes | None) -> list[Kill]:
        """A run that suffers these kills, one after another; returns those that came before it ended."""
        done: list[Kill] = []
        joining = ["--address", nodes.address] if nodes is not None else []
        with (out.parent / f"{out.name}.log").open("w") as log:
            child = subprocess.Popen(command(self.recipe, out, *joining), stdout=log, stderr=log)
            for kill in kills:
                seen = _last_step(out)
                while child.poll() is None and _last_step(out) == seen:  # it trains: a step has been done since
                    time.sleep(0.1)
                time.sleep(kill.moment)
                if child.poll() is not None or not strike(kill.victim, child, nodes):
                    continue
                if kill.victim == "driver":
                    child = subprocess.Popen(command(self.recipe, out, "--resume"), stdout=log, stderr=log)
                done.append(kill)
                self.console.print(f"{out.name}: killed {kill.victim} {kill.moment:.2f} s after a step")
            child.wait()
        return done


def _last_step(out: Path) -> float:
    file = out / "metrics.jsonl"
    return file.stat().st_mtime if file.is_file() and file.stat().st_size else 0.0


def main() -> int:
    """Kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.yaml"))
    parser.add_argument("--kills", type=int, default=60, help="of processes")
    parser.add_argument("--node-kills", type=int, default=10, help="of whole Ray nodes")
    parser.add_argument("--kills-per-run", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    args = parser.parse_args()
    console, draw = Console(), random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    undisturbed = args.out / "undisturbed"
    began = time.monotonic()
    subprocess.run(command(args.recipe, undisturbed), check=True, stdout=subprocess.DEVNULL)
    console.print(f"undisturbed run: {time.monotonic() - began:.0f} s")
    before = belongings()
    chaos = Chaos(args.recipe, args.out, args.kills_per_run, draw, console, fingerprint(undisturbed))
    done = chaos.rounds(args.kills, [*GROUPS, "driver"])
    if args.node_kills:
        nodes = Nodes(len(GROUPS) + 1)
        try:
            done += chaos.rounds(args.node_kills, [NODE + role for role in GROUPS], nodes)
        finally:
            nodes.close()
    return report(done, leftovers(before), args.out, console)


def report(outcomes: list[Kill], left: list[str], out: Path, console: Console) -> int:
    """The table, and ``chaos.json``; 1 if a kill was not survived or something was left behind."""
    total, survived = Counter(o.victim for o in outcomes), Counter(o.victim for o in outcomes if o.survived)
    table = Table(title="Kills survived: the run ended with the undisturbed run's weights and metrics, bit for bit")
    for column in ("killed", "kills", "survived"):
        table.add_column(column, justify="left" if column == "killed" else "right")
    for victim in sorted(total):
        table.add_row(victim, str(total[victim]), str(survived[victim]))
    table.add_row("all", str(total.total()), str(survived.total()))
    console.print(table)
    console.print(f"processes, ports and shared memory left behind: {len(left)}", *left, sep="\n")
    (out / "chaos.json").write_text(
        json.dumps({"kills": [vars(o) for o in outcomes], "left_behind": left}, indent=1) + "\n", "utf-8"
    )
    return int(survived.total() < total.total() or bool(left))


if __name__ == "__main__":
    sys.exit(main())
