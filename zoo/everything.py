"""Make the models of emoji64 one after another, on two processes of one thread. ``python -m zoo.everything``.

Every stage is resumable and the finished ones are remembered in ``ZOO_WORK/done``: stop and start it at will. SIGTERM
to the process group ends all; torchrun's workers are sessions of their own and outlive a SIGKILL to it. Minutes are of
CPU time of each process. Finished models go to ``ZOO_OUT``.

``--list`` shows the stages, ``--only NAME ...`` runs some, ``--until NAME`` ends after one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from zoo import data

TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29717", "-m"]
ONE = [sys.executable, "-m"]
CLI = str(Path(sys.executable).with_name("rlhf-t2i"))
WARM_GENERATOR, WARM_FLOW = (
    f"models.generator={data.WORK / name}" for name in ("warm_generator", "warm_flow_generator")
)
RUN = [CLI, "run", "recipes/emoji64/distill.yaml", "--set", WARM_GENERATOR]
FLOW_REFERENCE = f"models.reference={data.OUT / 'flow/reference'}"
RUN_FLOW = [CLI, "run", "recipes/emoji64/distill_flow.yaml", "--set", FLOW_REFERENCE, "--set", WARM_FLOW]
FLOW_PAIRS = ["pairs", "--flow", "--count", "6016"]
OLD = data.WORK / "shipped/reference"  # an earlier reference to start from, if it is there
WARM = ["--warm", str(OLD)] if OLD.is_dir() else []
Command = list[str]

# Name, and the commands that run side by side: at most two processes of one thread in all.
STAGES: list[tuple[str, list[Command]]] = [
    ("vae", [[*TWO, "zoo.vae", "--minutes", "15"]]),
    ("reader and latents", [[*ONE, "zoo.reader", "--minutes", "16"], [*ONE, "zoo.latents", "--shards", "24"]]),
    ("reference, 60 min", [[*TWO, "zoo.reference", "--minutes", "60", *WARM]]),
    ("more latents", [[*ONE, "zoo.latents", "--shards", "80", "--part", p, "--parts", "2"] for p in "01"]),
    ("reference, 120 min", [[*TWO, "zoo.reference", "--minutes", "120"]]),
    ("decoder, 40 min", [[*TWO, "zoo.vae", "--decoder", "--minutes", "40", "--lr", "1e-3"]]),
    ("reference, 240 min", [[*TWO, "zoo.reference", "--minutes", "240"]]),
    ("reference, finished", [[*TWO, "zoo.reference", "--finish", "45"]]),
    ("export", [[*ONE, "zoo.reference", "--export"]]),
    ("pairs", [[*ONE, "zoo.distill", "pairs", "--count", "6016", "--part", p, "--parts", "2"] for p in "01"]),
    ("warmup", [[*TWO, "zoo.distill", "warmup", "--minutes", "20"]]),
    ("distill", [[*RUN, "--out", str(data.WORK / "distill")]]),
    ("export generator", [[*ONE, "zoo.distill", "export", str(data.WORK / "distill")]]),
    ("flow", [[*TWO, "zoo.flow", "--minutes", "45"]]),
    ("flow, finished", [[*TWO, "zoo.flow", "--finish", "10"]]),
    ("export flow", [[*ONE, "zoo.flow", "--export"]]),
    ("pairs of flow", [[*ONE, "zoo.distill", *FLOW_PAIRS, "--part", p, "--parts", "2"] for p in "01"]),
    ("warmup of the flow generator", [[*TWO, "zoo.distill", "warmup", "--flow", "--minutes", "8"]]),
    ("distill the flow generator", [[*RUN_FLOW, "--out", str(data.WORK / "distill_flow")]]),
    ("export the flow generator", [[*ONE, "zoo.distill", "export", "--flow", str(data.WORK / "distill_flow")]]),
]


def run(name: str, commands: list[Command]) -> bool:
    """True if every command of a stage ended well."""
    print(time.strftime("%F %T"), name, flush=True)
    children = [subprocess.Popen(command) for command in commands]
    codes = [child.wait() for child in children]
    return not any(codes)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--until")
    args = parser.parse_args()
    done = data.WORK / "done"
    done.mkdir(parents=True, exist_ok=True)
    for name, commands in STAGES:
        marker = done / name
        if args.list:
            print(
                "done" if marker.exists() else "    ",
                name,
                [" ".join(Path(part).name if part == c[0] else part for part in c) for c in commands],
            )
        elif not marker.exists() and (not args.only or name in args.only):
            if not run(name, commands):
                sys.exit(f"{name} failed")
            marker.touch()
        if name == args.until:
            break


if __name__ == "__main__":
    main()
