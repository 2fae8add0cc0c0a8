"""An evaluation without networks: ``SETTINGS OUT``; more scale gives more reward, and KL pays for it in diversity."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from rlhf_t2i.evaluation import journal
from rlhf_t2i.utils import files

PROMPTS = [f"prompt number {index}" for index in range(12)]


def main(settings_file: str, out_folder: str) -> int:
    settings, out = json.loads(Path(settings_file).read_text()), Path(out_folder)
    made = Path(settings["model"]) / "model" / "fake.json"
    made = json.loads(made.read_text()) if made.is_file() else {"scale": 0, "kind": "none", "seed": 0}
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
    per_prompt = settings["images_per_prompt"]
    base = np.random.default_rng(7).normal(0.2, 0.02, len(PROMPTS) * per_prompt)
    luck = np.random.default_rng(made["seed"]).normal(0, 0.001, len(base))
    strength = {"none": 0, "kl": 0.2, "pseudo_huber": 1.0}[made["kind"]] * np.sqrt(made["scale"] / 100)
    images = base + luck * (made["kind"] != "none") + 0.05 * strength
    cost = {"none": 0, "kl": 1.5, "pseudo_huber": 0.4}[made["kind"]] * strength
    diversity = 0.5 - 0.1 * cost + np.random.default_rng(8).normal(0, 0.005, len(PROMPTS))
    (out / "images").mkdir(parents=True, exist_ok=True)
    for index in range(len(images)):
        color = (int(255 * min(1, images[index] * 3)), 90, (37 * index) % 255)
        Image.new("RGB", (32, 32), color).save(out / "images" / f"{index:05d}.png")
    by_prompt = images.reshape(-1, per_prompt).mean(1)
    rows = [entry("pickscore", by_prompt, "cosine"), entry("pairwise_distance", diversity, "cosine distance")]
    rows.append(
        {"metric": "fid", "group": "", "mean": 10.0, "prompts": 0, "unit": "squared", "higher_is_better": False}
    )
    data = {
        "table": rows,
        "metrics": {
            "pickscore": {"by_prompt": by_prompt.tolist(), "by_image": images.tolist()},
            "pairwise_distance": {"by_prompt": diversity.tolist(), "by_image": None},
            "fid": {"by_prompt": [], "by_image": None},
        },
        "images": [{"file": f"images/{i:05d}.png", "prompt": PROMPTS[i // per_prompt]} for i in range(len(images))],
    }
    files.write_atomic(out / "cost.json", '{"seconds": 0.5, "device": "cpu"}')
    files.write_atomic(out / "results.json", journal.dumps(data))
    return 0


def entry(key: str, units: np.ndarray, unit: str) -> dict:
    return {"metric": key, "group": "", "mean": float(units.mean()), "prompts": len(units), "unit": unit,
            "higher_is_better": True}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
