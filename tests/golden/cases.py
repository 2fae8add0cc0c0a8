"""The recorded runs: their recipes, the command lines that start them, and nothing else of the package.

Keys of a recipe and options of the commands are written here alone, so that a rename touches this file only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests import tiny
from tests.golden import reading
from tests.golden.reading import Result

ROOT = Path(__file__).parents[2]
ALL_ROLES = ["learner", "generator", "assistant", "reference", "reward"]


@dataclass(frozen=True)
class Inputs:
    """Tiny random models and prompts; reference and generator differ, or nothing would be aligned."""

    folder: Path

    def make(self) -> Inputs:
        """Write them; returns itself."""
        for family, write in (("sdxl", tiny.make_sdxl), ("sd15", tiny.make_sd15)):
            write(self.folder / family / "reference", seed=0)
            write(self.folder / family / "generator", seed=1)
        tiny.make_clip(self.folder / "clip")
        tiny.make_prompts(self.folder, "train.txt", 0, 16)
        tiny.make_prompts(self.folder, "held_out.txt", 16, 8)
        return self

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)


@dataclass(frozen=True)
class Case:
    """One recording.

    Attributes:
        run: Leaves its files in a folder and says what they hold.
        ray: Whether it starts Ray.
        by_hand: Whether it is left out of the tests.
    """

    run: Callable[[Inputs, Path], Result]
    ray: bool = False
    by_hand: bool = False


def recipe(inputs: Inputs, changes: dict[str, Any], family: str = "sdxl") -> dict[str, Any]:
    """A recipe of two steps in one process; ``changes`` are values by dotted key."""
    optimizer = {"lr": 1.0e-3, "eps": 1.0e-4}  # an epsilon near the gradients: Adam does not magnify rounding
    data: dict[str, Any] = {
        "seed": 3,
        "steps": 2,
        "models": {
            "reference": inputs[f"{family}/reference"],
            "generator": inputs[f"{family}/generator"],
            "height": tiny.RESOLUTION,
            "width": tiny.RESOLUTION,
        },
        "student": {"timesteps": [399.0]},
        "data": {"prompts": inputs["train.txt"], "held_out": inputs["held_out.txt"]},
        "algorithm": {"divergence": {"name": "pseudo_huber"}, "cfg": {"mode": "inner", "guidance_scale": 3.0}},
        "optimization": {"batch_size": 4, "generator": dict(optimizer), "assistant": dict(optimizer)},
        "placement": "local",
        "logging": {"samples_every": 2, "sample_count": 2, "watch_every": 1, "watch_images": 4},
        "checkpoints": {"every": 100},
        "evaluation": {"images": 8, "images_per_prompt": 2, "batch_size": 4},
    }
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = data
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return data


def pickscore(inputs: Inputs) -> dict[str, Any]:
    return {"name": "pickscore", "scale": 100.0, "options": {"model": inputs["clip"]}}


def clip(inputs: Inputs) -> dict[str, Any]:
    return {"name": "clip", "scale": 30.0, "options": {"model": inputs["clip"]}}


TWO_MICRO_BATCHES = {"optimization.micro_batch": 2}
AVERAGE = {"optimization.ema": {"half_life_kimg": 0.01, "rampup": 1.0}}  # else two steps would average nothing
ADAPTERS = {
    "optimization.generator.lora": {"rank": 4},
    "optimization.assistant.lora": {"rank": 2, "alpha": 4.0},
}


def di_star(inputs: Inputs) -> dict[str, Any]:
    judge = {"name": "clip", "label": "judge", "options": {"model": inputs["clip"]}}
    return {
        "algorithm.divergence": {"name": "pseudo_huber"},
        "algorithm.rewards": [pickscore(inputs)],
        "algorithm.eval_rewards": [judge],
    }


def di_plus_plus(inputs: Inputs) -> dict[str, Any]:
    return {
        "algorithm.divergence": {"name": "kl"},
        "algorithm.rewards": [pickscore(inputs), clip(inputs), {"name": "cfg_implicit", "scale": 0.5}],
        "algorithm.cfg": {"mode": "outer", "guidance_scale": 2.0},
        "algorithm.assistant_warmup": 1,
    }


def sim(inputs: Inputs) -> dict[str, Any]:
    return {
        "algorithm.divergence": {"name": "l2"},
        "algorithm.rewards": [],
        "algorithm.weighting": "inv_mean_abs",
        "algorithm.assistant_steps": 2,
    }


def diff_instruct(inputs: Inputs) -> dict[str, Any]:
    return {
        "algorithm.divergence": {"name": "kl"},
        "algorithm.rewards": [],
        "algorithm.cfg": {"mode": "inner", "guidance_scale": 0.0},
        "algorithm.weighting": "score",
    }


def over_ray(zero: int, groups: dict[str, tuple[int, list[str]]]) -> dict[str, Any]:
    """Groups of (processes, roles); a rank's share of two images goes in two micro-batches."""
    return {
        "optimization.zero_stage": zero,
        "optimization.micro_batch": 1,
        "placement": {
            "mode": "ray",
            "groups": {
                name: {"devices": devices, "threads": 1, "roles": roles} for name, (devices, roles) in groups.items()
            },
        },
    }


TOGETHER = {"all": (2, ALL_ROLES)}
APART = {"train": (2, ["learner", "generator"]), "serve": (1, ["assistant", "reference", "reward"])}


def trained(*parts: Callable[[Inputs], dict[str, Any]] | dict[str, Any], family: str = "sdxl") -> Any:
    """A case that runs a recipe once."""

    def run(inputs: Inputs, out: Path) -> Result:
        train(recipe(inputs, merged(inputs, parts), family), out)
        return reading.of_run(out)

    return run


def merged(inputs: Inputs, parts: Any) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for part in parts:
        changes |= part(inputs) if callable(part) else part
    return changes


def train(data: dict[str, Any], out: Path, *options: str) -> None:
    """``rlhf-t2i run``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_name(f"{out.name}.yaml")
    file.write_text(yaml.safe_dump(data, sort_keys=False), "utf-8")
    command("run", str(file), "--out", str(out), *options)


def resumed(inputs: Inputs, out: Path) -> Result:
    """Four steps at once, and two and two: the same, bit for bit."""
    changes = merged(inputs, (di_star, AVERAGE, TWO_MICRO_BATCHES, {"algorithm.assistant_steps": 2}))
    train(recipe(inputs, changes | {"steps": 4}), out / "whole")
    train(recipe(inputs, changes | {"steps": 2}), out / "parts")
    train(recipe(inputs, changes | {"steps": 4}), out / "parts", "--resume", "--allow-recipe-change")
    whole, parts = reading.of_run(out / "whole"), reading.of_run(out / "parts")
    assert parts.digests() == whole.digests(), "a resumed run differs from one that was never stopped"
    return parts


def evaluated(inputs: Inputs, out: Path) -> Result:
    """``rlhf-t2i eval`` and ``sample`` of a run's model."""
    train(recipe(inputs, di_star(inputs) | {"steps": 1}), out / "run")
    command(
        "eval", str(out / "run"), "--prompts", inputs["held_out.txt"], "--limit", "4", "--images-per-prompt", "3",
        "--batch-size", "4", "--seed", "7", "--features", inputs["clip"], "--classes", "cat|owl|horse",
        "--metrics", "pickscore,judge=clip,diversity,class_entropy", "--set", f"pickscore.model={inputs['clip']}",
        "--set", "pickscore.unit=logit", "--set", f"judge.model={inputs['clip']}", "--out", str(out / "evaluation"),
    )  # fmt: skip
    picture = out / "sample.png"
    prompts = ("--prompt", "a red cat", "--prompt", "an owl")
    command("sample", str(out / "run"), *prompts, "--seed", "5", "-o", str(picture))
    return reading.of_evaluation(out / "evaluation", picture)


def quickstart(inputs: Inputs, out: Path) -> Result:
    """Ten steps of the shipped recipe, on the shipped models."""
    changes = {
        "steps": 10,
        "placement": "local",
        "optimization.precision": "fp32",
        "evaluation.images": 32,
        "checkpoints.every": 1000,
    }
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    command("run", str(ROOT / "recipes/quickstart.yaml"), "--out", str(out), *sets)
    return reading.of_run(out)


CASES: dict[str, Case] = {
    "di_star": Case(trained(di_star, AVERAGE, TWO_MICRO_BATCHES)),
    "di_plus_plus": Case(trained(di_plus_plus, ADAPTERS, AVERAGE)),
    "sim": Case(trained(sim, TWO_MICRO_BATCHES, family="sd15")),
    "diff_instruct": Case(trained(diff_instruct, ADAPTERS, TWO_MICRO_BATCHES)),
    "resumed": Case(resumed),
    "evaluation": Case(evaluated),
    "zero_1": Case(trained(di_star, ADAPTERS, AVERAGE, over_ray(1, TOGETHER)), ray=True),
    "zero_2": Case(trained(di_plus_plus, AVERAGE, over_ray(2, APART)), ray=True),
    "zero_3": Case(trained(sim, AVERAGE, over_ray(3, TOGETHER)), ray=True),
    "quickstart": Case(quickstart, by_hand=True),
}


def command(*arguments: str) -> None:
    """``rlhf-t2i ARGUMENTS`` in this process.

    Raises:
        RuntimeError: It did not end with 0.
    """
    from rlhf_t2i.cli import main

    with _arguments("rlhf-t2i", *arguments):
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(f"rlhf-t2i {' '.join(arguments)} ended with {stop.code}") from None


@contextmanager
def _arguments(*arguments: str) -> Iterator[None]:
    before, sys.argv = sys.argv, list(arguments)
    try:
        yield
    finally:
        sys.argv = before
