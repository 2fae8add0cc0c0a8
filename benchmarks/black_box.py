"""PickScore as a black box in emoji64: its true gradient, a surrogate, and two estimates from values alone.

``python benchmarks/black_box.py runs/black_box`` runs every method with every seed, as many at once as there are
processes, and writes the table and the plot of docs/black_box.md; finished runs are not repeated. All methods make
``STEPS`` updates. Both estimates ask the scorer for 32 images per update; the surrogate for 16, and before the first
update for as many as that saves. The true gradient is one call per image of the batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rlhf_t2i import plugins
from rlhf_t2i.evaluation import results
from rlhf_t2i.evaluation.held_out import Samples
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.plugins import registry
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Models, Recipe, StudentSettings
from rlhf_t2i.training import run
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.utils import files, jsonl

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "zoo/emoji64"
STEPS, BATCH, WARMUP = 100, 16, 100
SURROGATE = 400.0
"""The surrogate's scale. Its gradient is about a fifth of the true one, whose scale is 100: a regression shrinks."""
METHODS = ("true gradient", "surrogate", "score function", "zeroth order")
CURVE = "curve.jsonl"


class EstimateOptions(plugins.Options):
    """How a gradient is estimated from values."""

    antithetic: bool = Field(description="values at x0 + s e and x0 - s e; else at two samples of N(x0, s^2)")
    sigma: float = Field(0.1, gt=0, description="s, in standard deviations of the latents")
    norm: float = Field(0.03, gt=0, description="mean norm to which a batch's gradients are scaled")


class Estimate(plugins.LatentReward):
    """PickScore's gradient at the generator's output, estimated from its values at two perturbed outputs per sample.

    ``antithetic``: ``(r(x + s e) - r(x - s e)) e / 2s``, zeroth order. Else the score function's estimate of a Gaussian
    policy around the one-step generator's output, which has no density of its own:
    ``sum_j (r(x + s e_j) - b) e_j / 2s`` with ``b`` the mean of the batch's other values. The noise of both is some 30
    times their signal, so that their norm is set to the true gradient's: unscaled they would outweigh the divergence.
    """

    Options = EstimateOptions
    options: EstimateOptions
    reference_calls = 0

    def __init__(self, options: EstimateOptions | None = None) -> None:
        super().__init__(options)
        self.scorer = registry.reward("pickscore", model=str(ZOO / "pickscore"))
        models = Models(reference=str(ZOO / "reference"), generator=str(ZOO / "generator"))
        self._decoder = ModelStore(models, StudentSettings(), torch.device("cpu")).decoder

    def score_latents(self, latents: Tensor, prompts: Sequence[str], context: plugins.LatentContext) -> Tensor:
        """Values [B] whose gradient in the latents is the estimate."""
        with torch.no_grad():
            gradient, value = self._estimate(latents.detach(), prompts, context)
        return value + ((latents - latents.detach()) * gradient).flatten(1).sum(1)

    def _estimate(
        self, x: Tensor, prompts: Sequence[str], context: plugins.LatentContext
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        sigma, first = self.options.sigma, context.sample_noise(x)
        draw = torch.Generator().manual_seed(int(first.abs().sum() * 1e3))
        second = -first if self.options.antithetic else torch.randn(x.shape, generator=draw)
        values = torch.stack([self._values(x + sigma * noise, prompts) for noise in (first, second)])
        baseline = torch.zeros(()) if self.options.antithetic else (values.sum() - values) / (values.numel() - 1)
        advantage = (values - baseline)[..., None, None, None]
        gradient = (advantage * torch.stack([first, second])).sum(0) / (2 * sigma)
        return gradient * self.options.norm / gradient.flatten(1).norm(dim=1).mean(), values.mean(0)

    def _values(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        images = (self._decoder.decode(latents) * 255).round() / 255  # what a scorer of pictures would get
        return self.scorer.score(images, prompts)


def recipe(method: str, seed: int) -> tuple[Recipe, int, int]:
    """The method's recipe, its scorer calls before the first update, and per update."""
    pick = {"name": "pickscore", "scale": 100.0, "options": {"model": str(ZOO / "pickscore")}}
    learned = {
        "prompts": BATCH // 2, "images_per_prompt": 2, "warmup": WARMUP,
        "features": str(ZOO / "features"), "of": {key: pick[key] for key in ("name", "options")},
    }  # fmt: skip
    asked = {
        "true gradient": (0, BATCH),
        "surrogate": (WARMUP * BATCH, BATCH),
    }
    first, each = asked.get(method, (0, 2 * BATCH))
    rewards = {
        "true gradient": {**pick, "label": "trained"},
        "surrogate": {"name": "surrogate", "label": "trained", "scale": SURROGATE, "options": learned},
    }
    estimate = {"name": f"{__file__}:Estimate", "label": "trained", "scale": 100.0}
    reward = rewards.get(method) or {**estimate, "options": {"antithetic": method == "zeroth order"}}
    keys = {
        "seed": seed, "steps": STEPS, "placement": "local",
        "models": {"reference": str(ZOO / "reference"), "generator": str(ZOO / "generator")},
        "data": {"prompts": str(ZOO / "prompts/train.txt"), "held_out": str(ZOO / "prompts/held_out.txt")},
        "algorithm": {
            "rewards": [reward], "cfg": {"guidance_scale": 3.0},
            "eval_rewards": [
                {"name": "pickscore", "label": "true", "options": pick["options"]},
                {"name": "pickscore", "label": "judge", "options": {"model": str(ZOO / "judge")}},
            ],
        },
        "optimization": {
            "batch_size": BATCH, "generator": {"lr": 5e-5, "warmup_steps": 10},
            "assistant": {"lr": 2e-4, "warmup_steps": 10},
        },
        "logging": {"samples_every": 10**6, "sample_count": 2, "watch_every": 0},
        "checkpoints": {"every": 10**6, "keep": 1},
        "evaluation": {"images": 224, "images_per_prompt": 4, "batch_size": 32},
    }  # fmt: skip
    return reading.build(keys), first, each


class Curve(TrainCallback):
    """Writes what every measurement of held-out prompts found, by prompt, with the scorer calls so far.

    Args:
        recipe: Of the run.
        file: Where.
        calls: The scorer's, before the first update and per update.
    """

    def __init__(self, recipe: Recipe, file: Path, calls: tuple[int, int]) -> None:
        self._recipe, self._file, self._calls = recipe, file, calls

    def on_measurement(self, step: int, samples: Samples) -> None:
        """Record it."""
        found = {name: metric.by_prompt for name, metric in samples.metrics(self._recipe).items()}
        first, each = self._calls
        files.append_line(self._file, {"step": step, "calls": (first if step else 0) + each * step, **found})


def one(out: Path, method: str, seed: int) -> None:
    """One run, unless it is finished."""
    folder = out / f"{method.replace(' ', '_')}-{seed}"
    if (folder / "run.json").is_file():
        return
    files.remove(folder)
    torch.set_num_threads(1)
    made, first, each = recipe(method, seed)
    update = {"watch_every": made.steps // 2 + 1, "watch_images": made.evaluation.images}  # the end is measured anyway
    logging = made.logging.model_copy(update=update)
    made = made.model_copy(update={"logging": logging})
    run.run(made, folder, callback=Curve(made, folder / "evaluation" / CURVE, (first, each)))


def rows(out: Path) -> dict[tuple[str, int], list[dict[str, object]]]:
    """The curves of finished runs, with their ends."""
    found = {}
    for method in METHODS:
        for folder in sorted(out.glob(f"{method.replace(' ', '_')}-*")):
            if not (folder / "run.json").is_file():
                continue
            seed, curve = int(folder.name.rpartition("-")[2]), list(jsonl.rows(folder / "evaluation" / CURVE))
            _, first, each = recipe(method, seed)
            after = results.read(folder / "evaluation/after")
            assert after is not None
            end = {name: metric.by_prompt for name, metric in after.metrics.items()}
            found[method, seed] = [*curve, {"step": after.step, "calls": first + each * after.step, **end}]
    return found


def gains(curve: Sequence[dict[str, object]], name: str) -> tuple[list[int], np.ndarray]:
    """Calls, and the change of every prompt since the start [T, P]."""
    values = np.array([row[name] for row in curve], dtype=float)
    return [int(str(row["calls"])) for row in curve], values - values[0]


def report(out: Path, page: Path) -> str:
    """The table in Markdown; the plot goes to ``page``."""
    found, lines = rows(out), ["| method | seeds | updates | scorer images | true reward | judge | diversity |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for method in METHODS:
        curves = [curve for (name, _), curve in found.items() if name == method]
        if not curves:
            continue
        cells = []
        for name in ("true", "judge", "latent_distance"):
            ends = [gains(curve, name)[1][-1] for curve in curves]
            cells.append(_interval(np.array(ends)))
        last = curves[0][-1]
        lines.append(f"| {method} | {len(curves)} | {last['step']} | {last['calls']} | {' | '.join(cells)} |")
    _plot(found, page)
    return "\n".join(lines) + "\n"


def _interval(ends: np.ndarray) -> str:
    """Mean and 95% interval of changes [seeds, prompts], resampled over both."""
    draw = np.random.default_rng(0)
    means = [
        ends[draw.integers(len(ends), size=len(ends))][:, draw.integers(ends.shape[1], size=ends.shape[1])].mean()
        for _ in range(5000)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{ends.mean():+.4f} ({low:+.4f} to {high:+.4f})"


def _plot(found: dict[tuple[str, int], list[dict[str, object]]], page: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.8), constrained_layout=True)
    for axis, (name, title) in zip(
        axes, (("true", "true reward (PickScore)"), ("judge", "unseen judge"), ("latent_distance", "diversity")),
        strict=True,
    ):  # fmt: skip
        for number, method in enumerate(METHODS):
            curves = [gains(curve, name) for (label, _), curve in found.items() if label == method]
            if not curves:
                continue
            calls, means = curves[0][0], np.array([change.mean(1) for _, change in curves])
            axis.plot(calls, means.mean(0), color=f"C{number}", label=method)
            axis.fill_between(calls, means.min(0), means.max(0), color=f"C{number}", alpha=0.15, linewidth=0)
        axis.axhline(0, color="gray", linewidth=0.7)
        axis.set(title=title, xlabel="images scored", ylabel="change on held-out prompts")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), frameon=False)
    page.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(page, dpi=110)


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/images/black_box.png")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    todo = [] if args.report_only else [(method, seed) for seed in range(args.seeds) for method in METHODS]
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        for finished in [pool.submit(one, args.out, method, seed) for method, seed in todo]:
            finished.result()
    print(report(args.out, args.plot))


if __name__ == "__main__":
    main()
