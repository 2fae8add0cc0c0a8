"""A run folder as training leaves it, small and fast to make."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from rlhf_t2i.evaluation.results import Metric, Results

PROMPTS = [f"{name}, on a {color} background" for name in ("red apple", "cat face", "very long named ferris wheel")
           for color in ("blue", "light goldenrod yellow")]  # fmt: skip
PER_PROMPT = 4


def make_run(out: Path, *, finished: bool = True, steps: int = 60) -> Path:
    rng = np.random.default_rng(0)
    prompts = [prompt for prompt in PROMPTS for _ in range(PER_PROMPT)]
    base = rng.normal(0.21, 0.01, len(PROMPTS)).repeat(PER_PROMPT) + rng.normal(0, 0.002, len(prompts))
    gain = rng.normal(0.02, 0.004, len(prompts))
    write_evaluation(out, "before", prompts, {"pickscore": base, "clip": base + 0.05}, 0, [0.4] * len(PROMPTS))
    if finished:
        kept = [0.36 + 0.01 * i for i in range(len(PROMPTS))]
        scores = {"pickscore": base + gain, "clip": base + 0.05 + 0.1 * gain}
        write_evaluation(out, "after", prompts, scores, steps, kept)
    rows = "".join(json.dumps(step_row(step)) + "\n" for step in range(1, steps + 1))
    (out / "metrics.jsonl").write_text(rows + '{"step": 61, "rewa')  # cut short by a kill
    (out / "samples").mkdir()
    for step in range(0, steps + 1, 10):
        picture(step, 256).save(out / "samples" / f"step_{step:06d}.png")
    (out / "recipe.yaml").write_text(
        "seed: 0\nsteps: 60\nmodels: {reference: org/a, generator: org/b}\n"
        "data: {prompts: p.txt, held_out: h.txt}\nalgorithm:\n  divergence: {name: pseudo_huber}\n"
        "  rewards: [{name: pickscore, scale: 100.0}]\n  cfg: {mode: inner, guidance_scale: 7.5}\n"
    )
    run = {
        "versions": {"rlhf-t2i": "0.1.0", "torch": "2.13.0+cpu"}, "git": "f971f9b", "seed": 0,
        "started": "2026-11-22T20:00:00Z", "finished": "2026-11-22T20:05:00Z", "seconds": 300.0, "device": "cpu",
        "placement": [["models", 1, ["learner", "generator"]], ["scores", 1, ["assistant", "reference", "reward"]]],
        "command": "rlhf-t2i run recipes/quickstart.yaml --out <out>",
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(run))
    return out


def write_evaluation(out: Path, name: str, prompts: list[str], scores: dict, step: int, diversity: list[float]) -> None:
    folder = out / "evaluation" / name
    (folder / "images").mkdir(parents=True)
    images = [f"images/{index:05d}.png" for index in range(len(prompts))]
    for index, file in enumerate(images):
        picture(index + (100 if name == "after" else 0)).save(folder / file)
    kinds = {"pickscore": "train", "clip": "eval"}
    metrics = [Metric.of_images(key, [float(v) for v in values], prompts, kind=kinds[key], unit="cosine")
               for key, values in scores.items()]  # fmt: skip
    metrics.append(Metric.of_prompts("latent_distance", diversity))
    Results(prompts, {m.key: m for m in metrics}, images=images, step=step, folder=folder).write()


def picture(seed: int, side: int = 64) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(int(v) for v in rng.integers(120, 250, 3)))
    corners = sorted(int(v) for v in rng.integers(6, side - 6, 2))
    ImageDraw.Draw(image).ellipse(
        [corners[0] - 5, 10, corners[1] + 5, side - 8], fill=(200, int(rng.integers(255)), 60)
    )
    return image


def step_row(step: int) -> dict:
    noise = math.sin(step * 1.7)
    return {
        "step": step, "images": 32 * step, "reward/pickscore": 0.2 + 0.0005 * step + 0.002 * noise,
        "reward_std/pickscore": 0.01, "grad_norm/reward/pickscore": 0.5 + 0.05 * noise, "grad_norm/reward": 0.5,
        "grad_norm/divergence": 0.9 + 0.02 * noise, "grad_cosine": -0.1 + 0.05 * noise, "divergence": 3 + step / 50,
        "delta_norm": 3.1, "delta_norm/t000-249": 1.0, "delta_norm/t250-499": 2.0, "delta_norm/t500-749": 3.0,
        "delta_norm/t750-999": 6.0, "assistant_loss": 0.1 - 0.0003 * step, "param_grad_norm/generator": 2 + noise,
        "param_grad_norm/assistant": 1.0, "lr/generator": 1e-5, "lr/assistant": 1e-5,
        "timing": {"step": 2.0, "assistant": 0.8, "generator": 1.2, "bytes": 4096, "busy": {"models/0/learner": 1.0},
                   "idle": {"models/0": 0.3, "scores/0": 0.5}},
        "memory": {"models/0": 1.5e9, "scores/0": 2e9},
    }  # fmt: skip
