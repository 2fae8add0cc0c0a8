"""Every role of an SDXL step alone, at full size: seconds and activations beside what ``rlhf-t2i plan`` predicts.

``python benchmarks/full_size.py --folder FOLDER``

Random weights of the exact architectures at 1024 px in bf16, one image, one role a process, so that 24 GB of memory do,
on a GPU or a CPU. Trained networks are bf16 too and take no optimizer step: states are ``memory.py``'s subject. Rates
are measured as ``plan --device here`` does. ``--small`` takes small networks in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from against_plain import _training_in
from gpu_sections import Settings, Timer, batch, build, load
from role_memory import MeasuredWorker

from rlhf_t2i.algorithm import rng
from rlhf_t2i.families.store import DTYPES
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.local_calls import Deferred
from rlhf_t2i.roles.worker import WorkerSpec
from rlhf_t2i.tools.planning import calibration, plan
from rlhf_t2i.tools.planning.speed import Measured, Passes

PARTS: dict[str, tuple[str, str]] = {
    "generator: drawing": ("generator", "generator"),
    "assistant: training": ("assistant", "train"),
    "learner": ("learner", "step"),
    "assistant: serving": ("assistant", "serve"),
    "reference, both branches": ("reference", "serve"),
    "decoder and rewards": ("reward", "score"),
}
"""A part of a step: the role and what it does."""
CHECKPOINTING = {"kept": "false", "recomputed": "true"}


class Stub:
    """Stands for roles of other processes: predictions, gradients and samples of zeros, at once."""

    place = "elsewhere"

    def __init__(self, recipe: Recipe) -> None:
        self._labels = [choice.key for choice in recipe.algorithm.rewards]

    def submit(self, method: Callable[..., Any], *args: Any) -> Deferred[Any]:
        """Start a call of a denoiser or of rewards."""
        if method.__name__ == "value_and_grad":
            x0 = args[0]
            return Deferred(lambda: {label: (torch.zeros(len(x0)), torch.zeros_like(x0)) for label in self._labels})
        return Deferred(lambda: torch.zeros_like(args[1]))


class NoiseGenerator:
    """Stands for the generator in the assistant's update: noise serves as well as its samples."""

    place = "elsewhere"

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def submit(self, _method: Callable[..., Any], _prompts: Any, keys: Any, *_: Any) -> Deferred[Any]:
        """Start a call."""
        return Deferred(lambda: rng.normal(self._shape, keys))


def work(worker: MeasuredWorker, recipe: Recipe, role: str, does: str) -> Callable[[], Any]:
    """The role's own code for its part of a step on one micro-batch."""
    prompts, store = batch(recipe, 0), worker._context.store
    built: Any = worker.roles[role]
    keys = [(0, "full size", i) for i in range(len(prompts))]
    z = rng.normal(store.latent_shape, keys).to(worker.device)
    t = torch.full((len(prompts),), 500, device=worker.device)
    if does == "generator":
        return lambda: built.sample(prompts, keys)
    if does == "score":
        return lambda: built.value_and_grad(z, prompts)
    if does == "serve":

        def serve() -> None:
            branch = "conditional" if role == "assistant" else "guided"
            prediction = built.forward("full size", z, t, prompts, branch, True)
            built.vjp("full size", z, t, prompts, branch, torch.ones_like(prediction))

        return serve
    engine = built.engine
    engine.step = lambda _rate: float(bool(engine.module.zero_grad(set_to_none=True)))  # the update is not timed
    if role == "assistant":
        built.connect(NoiseGenerator(store.latent_shape))
        return lambda: built.train(0, prompts)
    stub = Stub(recipe)
    built.connect(stub, stub, [stub])
    return lambda: built.step(0, prompts)


def measure(settings: Settings, part: str, checkpointing: str) -> dict[str, float]:
    """Seconds of a part, and the peak of its activations over the state before."""
    recipe = load(settings, "placement=local", f"optimization.gradient_checkpointing={checkpointing}")
    role, does = PARTS[part]
    with _training_in(DTYPES[recipe.optimization.precision]):
        worker = MeasuredWorker(WorkerSpec(recipe, "all", (role,)))
    call = work(worker, recipe, role, does)
    call()
    timer, times = Timer(), 0
    timer.lap()
    began = time.perf_counter()
    while times < settings.steps and (times == 0 or time.perf_counter() - began < 10):
        call()
        times += 1
    found = {"seconds": timer.lap() / times}
    if does != "generator":
        worker.measure_activations(batch(recipe, 0), (role,), warm_up=False)
        found["activations"] = float(worker.held[role].activations or 0)
    return found


def predict(settings: Settings, speed: Measured, part: str, checkpointing: str) -> dict[str, float]:
    """What the plan says of a part."""
    recipe = load(settings, f"optimization.gradient_checkpointing={checkpointing}")
    seconds = plan.step_time(recipe, speed)
    (group,) = plan.make(recipe).groups
    role, does = PARTS[part]
    names = ("reward", "decoder") if does == "score" else (role,)
    kept = sum(item.memory.activations for item in group.roles if item.role.startswith(names))
    if does in ("generator", "train"):
        return {"seconds": seconds.roles("assistant")[role], "activations": float(kept)}
    timed = [value for name, value in seconds.roles("generator").items() if name.startswith(names)]
    return {"seconds": sum(timed), "activations": float(kept)}


def child(what: str, settings: Settings) -> dict[str, Any]:
    """One measurement in this process."""
    if what == "rates":
        return {part: asdict(seconds) for part, seconds in calibration.measure(load(settings), 1).image.items()}
    part, _, checkpointing = what.partition("|")
    return measure(settings, part, CHECKPOINTING[checkpointing])


def apart(what: str, settings: Settings) -> dict[str, Any]:
    """One measurement in a process of its own.

    Raises:
        RuntimeError: It failed; its own message went to stderr.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        given = json.dumps(asdict(settings))
        done = subprocess.run([sys.executable, __file__, "--child", what, given, answer.name], stdout=sys.stderr)
        if done.returncode:
            raise RuntimeError(f"{what}: exit code {done.returncode}")
        return json.load(answer)


def measured(image: dict[str, dict[str, float]]) -> Measured:
    """The speed of this machine from what ``rates`` wrote down; updates and text are not timed."""
    return Measured({part: Passes(**seconds) for part, seconds in image.items()})


def table(image: dict[str, dict[str, float]], rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"{measured(image).describe()}\n",
        "| part | activations | predicted, s | measured, s | ratio | predicted, GB | measured, GB | ratio |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        told, found = row["predicted"], row["measured"]
        cells = [row["part"], row["checkpointing"], f"{told['seconds']:.3g}", f"{found['seconds']:.3g}"]
        cells.append(f"{found['seconds'] / told['seconds']:.2f}")
        if "activations" in found:
            gigabytes = told["activations"] / 1e9, found["activations"] / 1e9
            cells += [f"{gigabytes[0]:.3g}", f"{gigabytes[1]:.3g}", f"{gigabytes[1] / gigabytes[0]:.2f}"]
        else:
            cells += ["-"] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every part and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of the random models: 12 GB, kept; a temporary one when absent")
    parser.add_argument("--small", action="store_true", help="small networks in float32")
    parser.add_argument("--parts", default="", help="only those that contain this")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="override of the recipe")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, given, answer = args.child
        data = json.loads(given)
        found = child(what, Settings(**{**data, "overrides": tuple(data["overrides"])}))
        Path(answer).write_text(json.dumps(found), "utf-8")
        return
    with tempfile.TemporaryDirectory() as place:
        folder = args.folder or Path(place)
        settings = Settings(args.small, str(folder), steps=3, batch=1, overrides=tuple(args.overrides))
        if not (folder / "overrides.json").is_file():
            build(settings)
        rates, rows = apart("rates", settings), []
        for part in PARTS:
            for name, checkpointing in CHECKPOINTING.items():
                if args.parts not in part or (PARTS[part][1] == "generator" and name == "recomputed"):
                    continue
                told = predict(settings, measured(rates), part, checkpointing)
                rows.append({"part": part, "checkpointing": name, "predicted": told})
                rows[-1]["measured"] = apart(f"{part}|{name}", settings)
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rates, rows))
    if args.json:
        args.json.write_text(json.dumps({"rates": rates, "rows": rows}, indent=1), "utf-8")


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    main()
