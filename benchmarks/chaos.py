"""Kill processes of a run at random moments and compare how it ends with an undisturbed run, bit for bit.

``python benchmarks/chaos.py --kills 60``, or ``make chaos``. The victim (the process of a role, or the driver, which is
then resumed) and the moment after a step are drawn from the seed; moments cover a whole step and more, so that every
phase is hit. A run suffers several kills; runs are repeated until enough were made.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

GROUPS = {"learner": "train", "generator": "draw", "assistant": "model", "reference": "look", "reward": "score"}
PLACEMENT = (
    "placement={mode: ray, max_restarts: 1000, groups: {"
    + ", ".join(f"{group}: {{roles: [{role}], threads: 1}}" for role, group in GROUPS.items())
    + "}}"
)
SMALL = [
    "steps=8", "checkpoints.every=2", "optimisation.batch_size=4", "algorithm.assistant_steps=2",
    "evaluation={images: 4, images_per_prompt: 2}", "logging={samples_every: 100, sample_count: 2}", PLACEMENT,
]  # fmt: skip


@dataclass
class Kill:
    """Who, when (seconds after a step), and whether the run then ended like the undisturbed one."""

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


def find(driver: int, victim: str) -> psutil.Process | None:
    """The driver, or the actor of a role in this driver's Ray."""
    if victim == "driver":
        return psutil.Process(driver)
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if process.environ().get("RLHF_T2I_PROCESS") == f"{GROUPS[victim]}/0":
                return process
        except psutil.Error:
            continue
    return None


def leftovers(before: set[int]) -> list[str]:
    """Ray processes that were not there before."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if process.info["pid"] not in before and ("ray::" in line or "raylet" in line or "gcs_server" in line):
            found.append(line[:80])
    return found


def one_run(recipe: Path, out: Path, kills: Sequence[Kill], console: Console) -> list[Kill]:
    """A run that suffers these kills, one after another; returns those that came before it ended."""
    done: list[Kill] = []
    with (out.parent / f"{out.name}.log").open("w") as log:
        child = subprocess.Popen(command(recipe, out), stdout=log, stderr=log)
        for kill in kills:
            seen = _last_step(out)
            while child.poll() is None and _last_step(out) == seen:  # it trains: a step has been done since
                time.sleep(0.1)
            time.sleep(kill.moment)
            victim = None if child.poll() is not None else find(child.pid, kill.victim)
            if victim is None:
                continue
            victim.send_signal(signal.SIGKILL)
            if kill.victim == "driver":
                child.wait()
                child = subprocess.Popen(command(recipe, out, "--resume"), stdout=log, stderr=log)
            done.append(kill)
            console.print(f"{out.name}: killed {kill.victim} {kill.moment:.2f} s after a step")
        child.wait()
    return done


def _last_step(out: Path) -> float:
    file = out / "metrics.jsonl"
    return file.stat().st_mtime if file.is_file() and file.stat().st_size else 0.0


def main() -> int:
    """Kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.yaml"))
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--kills-per-run", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    args = parser.parse_args()
    console, draw = Console(), random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    undisturbed = args.out / "undisturbed"
    began = time.monotonic()
    subprocess.run(command(args.recipe, undisturbed), check=True, stdout=subprocess.DEVNULL)
    expected = fingerprint(undisturbed)
    console.print(f"undisturbed run: {time.monotonic() - began:.0f} s")
    before = {process.pid for process in psutil.process_iter()}
    done: list[Kill] = []
    while len(done) < args.kills:
        victims = draw.choices([*GROUPS, "driver"], k=min(args.kills_per_run, args.kills - len(done)))
        out = args.out / f"run_{len(done):03d}"
        kills = one_run(args.recipe, out, [Kill(v, round(draw.uniform(0, 3), 2)) for v in victims], console)
        same = (out / "model").is_dir() and fingerprint(out) == expected
        for kill in kills:
            kill.survived = same
        done += kills
        console.print(f"{out.name}: {'equal bit for bit' if same else f'DIFFERENT, see {out}.log'}")
        if not same and not kills:
            raise SystemExit(f"{out.name} failed without a kill: see {out}.log")
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
    console.print(f"processes left behind: {len(left)}", *left, sep="\n")
    (out / "chaos.json").write_text(
        json.dumps({"kills": [vars(o) for o in outcomes], "left_behind": left}, indent=1) + "\n", "utf-8"
    )
    return int(survived.total() < total.total() or bool(left))


if __name__ == "__main__":
    sys.exit(main())
