"""An evaluation without networks: ``SETTINGS OUT``; more scale gives more reward, and KL pays for it in diversity."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from rlhf_t2i.evaluation.results import Metric, Results
from rlhf_t2i.utils import files

PROMPTS = [f"prompt number {index}" for index in range(12)]


def main(settings_file: str, out_folder: str) -> int:
    settings, out = json.loads(Path(settings_file).read_text()), Path(out_folder)
    made = Path(settings["model"]) / "fake.json"
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
    prompts = [prompt for prompt in PROMPTS for _ in range(per_prompt)]
    metrics = [
        Metric.of_images("pickscore", images.tolist(), prompts, unit="cosine"),
        Metric.of_prompts("pairwise_distance", diversity.tolist(), unit="cosine distance"),
        Metric("fid", "set", "squared", higher_is_better=False, value=10.0),
    ]
    names = [f"images/{index:05d}.png" for index in range(len(images))]
    files.write_atomic(out / "cost.json", '{"seconds": 0.5, "device": "cpu"}')
    Results(prompts, {m.key: m for m in metrics}, images=names, folder=out).write()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
