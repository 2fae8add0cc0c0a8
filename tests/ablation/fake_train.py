"""A training run without training: ``RECIPE --set k=v ... --out OUT [--resume]``, with checkpoints and metrics.

The result is a pure function of the resolved recipe, however often it is stopped: what a run promises.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from rlhf_t2i.recipe import reading


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    recipe = reading.load(arguments[0], [arguments[i + 1] for i, a in enumerate(arguments) if a == "--set"])
    out = Path(arguments[arguments.index("--out") + 1])
    resume = "--resume" in arguments
    if (out / "recipe.yaml").exists() and not resume:
        print("already holds a run", file=sys.stderr)
        return 2
    scale = recipe.algorithm.rewards[0].scale
    if scale == 666:
        print("the reward is on fire", file=sys.stderr)
        return 1
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(reading.dump(recipe))
    start = max((int(p.name[5:]) for p in (out / "checkpoints").glob("step_*")), default=0)
    for step in range(start + 1, recipe.steps + 1):
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        row = {"step": step, "images": 32 * step, "reward/pickscore": 0.2 + 0.001 * scale * step, "divergence": 1.0,
               "grad_norm/reward": 0.5, "grad_norm/divergence": 2.0}  # fmt: skip
        with (out / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        (out / "checkpoints" / f"step_{step:06d}").mkdir(exist_ok=True)
    model = out / "model"
    model.mkdir(exist_ok=True)
    kind = recipe.algorithm.divergence.name
    (model / "fake.json").write_text(json.dumps({"scale": scale, "kind": kind, "seed": recipe.seed}))
    (out / "run.json").write_text(json.dumps({"seconds": 1.0, "device": "CPU", "versions": {"fake": "1"}}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
