"""Make the flow sister on one GPU in minutes. ``python -m zoo.flow_on_gpu --seconds 500 --out OUT``.

For a machine that is lent for so long: latents, the flow reference, pairs, the warm-up of its generator and the
distillation by this project's loop, each a command of its own that gets a share of the seconds. ``ZOO_OUT`` must hold
the other models of emoji64 (a copy of the folder). What is finished lies in OUT at once: ``flow_reference.tar`` and
``flow_generator.tar`` (folders of ``ZOO_OUT``), the logs as ``NAME.jsonl``, grids, and ``summary.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from zoo import data, device

Command = list[str]


@dataclass(frozen=True)
class Stage:
    """A command, and the folder that it leaves in ``ZOO_OUT``."""

    name: str
    command: Command
    made: str | None = None


@dataclass
class Run:
    """The stages in order, under one deadline."""

    seconds: float
    out: Path
    began: float = field(default_factory=time.monotonic)
    summary: dict[str, str] = field(default_factory=dict)

    def all(self, stages: list[Stage]) -> bool:
        """Whether every stage ended well; one that fails ends the others, which need it."""
        for stage in stages:
            code, taken = self._run(stage)
            self.summary[stage.name] = f"exit code {code} after {taken:.0f} s"
            self._keep(stage)
            if code:
                return False
        return True

    def _run(self, stage: Stage) -> tuple[int, float]:
        print(f"[{time.monotonic() - self.began:6.1f} s] {' '.join(stage.command)}", flush=True)
        began = time.monotonic()
        left = self.seconds - (began - self.began)
        try:
            code = subprocess.run(stage.command, timeout=max(left, 1.0), check=False).returncode
        except subprocess.TimeoutExpired:
            code = 124
        return code, time.monotonic() - began

    def _keep(self, stage: Stage) -> None:
        if stage.made and (data.OUT / stage.made).is_dir():
            with tarfile.open(self.out / f"{stage.made.replace('/', '_')}.tar", "w") as tar:
                tar.add(data.OUT / stage.made, arcname=stage.made)
        for path in (*data.WORK.glob("*.jsonl"), *data.WORK.glob("flow*.png")):
            shutil.copy(path, self.out / path.name)
        (self.out / "summary.json").write_text(json.dumps(self.summary, indent=1) + "\n", "utf-8")


def stages(seconds: float, large: bool) -> list[Stage]:
    """What is run; ``large``: in the batches of a GPU, else two steps of each, to try them."""
    minutes = lambda share: f"{share * seconds / 60:.3f}" if large else "0.02"  # noqa: E731
    python, cli = [sys.executable, "-m"], str(Path(sys.executable).with_name("rlhf-t2i"))
    batch = ["--batch", "768", "--lr", "2e-3"] if large else ["--batch", "4"]
    warm = ["--batch", "512"] if large else ["--batch", "4"]
    run = [cli, "run", "recipes/emoji64/distill_flow.yaml", "--out", str(data.WORK / "distill_flow"),
           "--set", f"models.reference={data.OUT / 'flow/reference'}",
           "--set", f"models.generator={data.WORK / 'warm_flow_generator'}"]  # fmt: skip
    steps, size = (300, 64) if large else (1, 4)
    run += ["--set", f"steps={steps}", "--set", f"optimization.batch_size={size}"]
    return [
        Stage("latents", [*python, "zoo.latents", "--shards", "200" if large else "1"]),
        Stage("reference", [*python, "zoo.flow", *batch, "--minutes", minutes(0.3)]),
        Stage("finished", [*python, "zoo.flow", *batch, "--finish", minutes(0.1)]),
        Stage("export", [*python, "zoo.flow", "--export"], "flow/reference"),
        Stage("measured", [*python, "zoo.flow", "--evaluate", "96" if large else "2"]),
        Stage("pairs", [*python, "zoo.distill", "pairs", "--flow", "--count", "8192" if large else "64"]),
        Stage("warmup", [*python, "zoo.distill", "warmup", "--flow", *warm, "--minutes", minutes(0.08)]),
        Stage("distill", run),
        Stage("generator", [*python, "zoo.distill", "export", "--flow", str(data.WORK / "distill_flow")],
              "flow/generator"),
    ]  # fmt: skip


def main() -> None:
    """Every stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=500.0, help="for everything")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is made")
    args = parser.parse_args()
    if not (data.OUT / "reference/unet").is_dir():
        parser.error(f"{data.OUT} holds no reference: name a copy of emoji64 with ZOO_OUT")
    args.out.mkdir(parents=True, exist_ok=True)
    data.WORK.mkdir(parents=True, exist_ok=True)
    if not Run(args.seconds, args.out).all(stages(args.seconds, device.on_cuda())):
        sys.exit("a stage failed: see summary.json")


if __name__ == "__main__":
    main()
