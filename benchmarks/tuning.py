"""The pictures of docs/tuning.md, from a finished ``rlhf-t2i ablate recipes/emoji64/ablation_tuning.yaml``.

``python benchmarks/tuning.py runs/tuning`` writes ``docs/images/tuning_*`` and prints the tables. Changes are paired
over the held-out prompts, and bars are their 95% intervals; each row is one seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from PIL import Image, ImageDraw

from rlhf_t2i.evaluation import results
from rlhf_t2i.evaluation.results import Results
from rlhf_t2i.utils import jsonl, stats

HUBER, KL = (0, 10, 30, 100, 300, 3000), (300, 3000, 30000)
GUIDANCE = {0.0: "guidance_0", 3.0: "huber_30", 6.0: "guidance_6"}
SCALES = {"pseudo-Huber": {scale: f"huber_{scale}" for scale in HUBER}, "KL": {scale: f"kl_{scale}" for scale in KL}}
FAR = {"pseudo-Huber, 30": "far_huber_30", "pseudo-Huber, 3000": "far_huber_3000", "KL, 3000": "far_kl_3000"}
PICTURES = ("initial", "huber_0", "huber_30", "huber_300", "huber_3000", "kl_3000", "kl_30000", *FAR.values())
MEASURES = (("pickscore", "PickScore (trained on)"), ("judge", "unseen judge"), ("pairwise_distance", "diversity kept"))
COLUMNS = 8
FIRST, LAST = slice(1, 11), slice(-10, None)
"""Steps over which forces are averaged. The first update has no assistant yet that differs from the reference."""


class Sweep:
    """A finished ablation's rows."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.initial = self.row("initial")

    def row(self, name: str) -> Results:
        """What was measured of a row.

        Raises:
            FileNotFoundError: The row is not finished.
        """
        folder = self.out / "evaluations" / (name if name == "initial" else f"{name}/seed_0")
        found = results.read(folder)
        if found is None:
            raise FileNotFoundError(f"{folder}: this row is not finished")
        return found

    def change(self, name: str, metric: str) -> tuple[float, float]:
        """The paired change and its 95% half-width; for diversity the share that is kept."""
        before, after = (found.metrics[metric].by_prompt for found in (self.initial, self.row(name)))
        mean = (stats.ratio if metric == "pairwise_distance" else stats.paired)(before, after)
        return mean.value, 1.96 * mean.error

    def push(self, name: str, steps: slice) -> float:
        """The reward's force on a generated latent over the divergence's, ``|scale dr/dx0| / |dL/dx0|``."""
        rows = list(jsonl.rows(self.out / "rows" / name / "seed_0/metrics.jsonl"))[steps]
        ratios = [float(str(row.get("grad_norm/reward", 0))) / float(str(row["grad_norm/divergence"])) for row in rows]
        return float(np.mean(ratios))


def table(sweep: Sweep, rows: dict[str, str], first: str) -> str:
    """The changes of rows by label, in Markdown."""
    lines = [f"| {first} | push / pull, first and last ten steps | PickScore | judge | diversity kept |"]
    lines.append("|---|---:|---:|---:|---:|")
    for label, name in rows.items():
        cells = [f"{sweep.push(name, FIRST):.2g}, {sweep.push(name, LAST):.2g}"]
        for metric, _ in MEASURES:
            value, error = sweep.change(name, metric)
            kept = metric == "pairwise_distance"
            cells.append(f"{value:.0%} ± {error:.0%}" if kept else f"{value:+.4f} ± {error:.4f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curve(axis: Axes, sweep: Sweep, metric: str, rows: dict[float, str], label: str, color: str) -> None:
    """One curve with its intervals."""
    means, errors = zip(*(sweep.change(name, metric) for name in rows.values()), strict=True)
    axis.errorbar(
        list(rows), means, errors, color=color, label=label, marker="o", markersize=4, linewidth=1.3, capsize=2
    )


def plots(sweep: Sweep, folder: Path) -> None:
    """Changes over the reward's scale and over the guidance."""
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
    for axis, (metric, title) in zip(axes, MEASURES, strict=True):
        for color, (label, rows) in zip(("C0", "C3"), SCALES.items(), strict=True):
            curve(axis, sweep, metric, {float(scale): name for scale, name in rows.items()}, label, color)
        axis.set_xscale("symlog", linthresh=10)
        axis.set(title=title, xlabel="the reward's scale")
        axis.axhline(1 if metric == "pairwise_distance" else 0, color="gray", linewidth=0.7)
    axes[0].legend(frameon=False)
    _save(figure, folder / "tuning_scale.svg")
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.0), constrained_layout=True)
    for axis, (metric, title) in zip(axes, MEASURES, strict=True):
        curve(axis, sweep, metric, GUIDANCE, "guidance", "C0")
        axis.set(title=title, xlabel="algorithm.cfg.guidance_scale")
        axis.axhline(1 if metric == "pairwise_distance" else 0, color="gray", linewidth=0.7)
    _save(figure, folder / "tuning_guidance.svg")


def _save(figure: pyplot.Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def pictures(sweep: Sweep, path: Path) -> None:
    """The same prompts and noise down each column, a row of the ablation per line."""
    groups = [indices[0] for indices in sweep.initial.members.values()]
    chosen = groups[:: len(groups) // COLUMNS][:COLUMNS]
    size, label = 96, 110
    sheet = Image.new("RGB", (label + COLUMNS * (size + 2), len(PICTURES) * (size + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, name in enumerate(PICTURES):
        found, top = sweep.row(name), line * (size + 2)
        draw.multiline_text((4, top + size / 3), _title(name), fill="black")
        for column, index in enumerate(chosen):
            with Image.open(found.folder / found.images[index]) as image:
                sheet.paste(image.convert("RGB").resize((size, size)), (label + column * (size + 2), top))
    sheet.quantize(192).save(path, optimize=True)


def _title(name: str) -> str:
    """A row of the pictures."""
    if name == "initial":
        return "initial\ngenerator"
    kind, scale = name.removeprefix("far_").split("_")
    far = ", far" if name.startswith("far_") else ""
    return f"{'pseudo-Huber' if kind == 'huber' else 'KL'}\nscale {scale}{far}"


def main() -> None:
    """Draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablation", type=Path)
    parser.add_argument("--images", type=Path, default=Path(__file__).parents[1] / "docs/images")
    args = parser.parse_args()
    sweep = Sweep(args.ablation)
    plots(sweep, args.images)
    pictures(sweep, args.images / "tuning_pictures.png")
    rows = {f"{label}, {scale}": name for label, named in SCALES.items() for scale, name in named.items()}
    print(table(sweep, rows, "divergence, scale"), end="\n\n")
    print(table(sweep, FAR, "divergence, scale, far"), end="\n\n")
    print(table(sweep, {f"{value:g}": name for value, name in GUIDANCE.items()}, "guidance"))


if __name__ == "__main__":
    main()
