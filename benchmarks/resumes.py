"""Stop a small run by SIGTERM after every update, resume it, and compare its end with an undisturbed run.

``python benchmarks/resumes.py --resumes 200 --out runs/resumes``: one process, ``placement: local``, tiny models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rlhf_t2i.errors import Stopped
from rlhf_t2i.recipe import reading
from rlhf_t2i.training import run
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.state import TrainState

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import tiny


class StopAfterOne(TrainCallback):
    """Sends SIGTERM to this process after an update, but for the last one."""

    def __init__(self, last: int) -> None:
        self._last = last

    def on_step(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """A generator step is done."""
        if state.step < self._last:
            signal.raise_signal(signal.SIGTERM)


def ending(out: Path) -> tuple[str, list[float]]:
    """A digest of the exported weights, and every step's gradient norm."""
    (file,) = (out / "model/unet").glob("*.safetensors")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16], [row["param_grad_norm/generator"] for row in rows]


def main() -> None:
    """Run twice, once with resumes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/resumes"))
    parser.add_argument("--resumes", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, prompts = tiny.make_sdxl(args.out / "sdxl"), tiny.make_prompts(args.out)
    keys = tiny.recipe_dict(model, prompts, steps=args.resumes + 1)
    keys["evaluation"], keys["logging"] = {"images": 2, "images_per_prompt": 2}, {"sample_count": 1, "watch_every": 0}
    keys["optimization"] |= {"ema": {"half_life_kimg": 0.01}}
    recipe = reading.build(keys)
    began = time.monotonic()
    run.run(recipe, args.out / "whole")
    seconds, stops = time.monotonic() - began, 0
    began = time.monotonic()
    while True:
        try:
            run.run(recipe, args.out / "broken", resume=stops > 0, callback=StopAfterOne(recipe.steps))
            break
        except Stopped:
            stops += 1
            if stops % 20 == 0:
                print(f"{stops} resumes", flush=True)
    same = ending(args.out / "whole") == ending(args.out / "broken")
    print(
        f"{stops} resumes in {time.monotonic() - began:.0f} s, undisturbed {seconds:.0f} s: weights and gradient norms "
        f"are {'equal' if same else 'DIFFERENT'}"
    )
    sys.exit(not same)


if __name__ == "__main__":
    main()
