"""Scaling on paper: seconds per step on 8 to 64 GPUs in machines of 8, by the plan's simulation (docs/scaling.md).

``python benchmarks/scaling.py --out docs/images``

Nothing is measured. Networks are given in Gb/s of all network cards of a machine together.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.placement import check_placement
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning import plan, time
from rlhf_t2i.tools.planning.devices import DEVICES
from rlhf_t2i.tools.planning.fit import changed
from rlhf_t2i.tools.planning.speed import Roofline
from rlhf_t2i.tools.report import plots

GPUS = (8, 16, 32, 64)
NETWORKS = (100, 400, 3200)
IMAGES_PER_GPU = 16
TRAIN, SCORE = ["learner", "generator", "reward"], ["assistant", "reference"]


@dataclass(frozen=True)
class Row:
    """One cluster and the step on it."""

    gpus: int
    network: int
    batch: int
    seconds: time.StepTime

    @property
    def images(self) -> float:
        """Images per second of generator updates."""
        return self.batch / self.seconds.step

    @property
    def communicating(self) -> float:
        """Share of the step in which the devices of the first group exchange data."""
        group = self.seconds.timeline.groups[0]
        busy = self.seconds.timeline.busy("communication")
        return sum(spent for (name, _), spent in busy.items() if name == group) / self.seconds.step

    @property
    def waiting(self) -> str:
        """Share of the step, by group, in which its devices wait for others."""
        return ", ".join(f"{group} {max(0.0, share):.0%}" for group, share in self.seconds.idle.items())


class Scaling:
    """A recipe on clusters of several sizes.

    Args:
        recipe: The recipe.
        device: Of every process.
    """

    def __init__(self, recipe: Recipe, device: str = "h100-80gb") -> None:
        self._recipe, self._device, self._networks = recipe, DEVICES[device], plan.networks_of(recipe)

    def row(self, gpus: int, network: int, batch: int, *, apart: bool = False) -> Row:
        """One cluster; ``apart``: half of it learns and scores, the other half serves denoisers."""
        everyone = {"devices": gpus, "roles": [*TRAIN, *SCORE]}
        half = {"devices": gpus // 2}
        split = {"train": {**half, "roles": TRAIN}, "score": {**half, "roles": SCORE}}
        keys = {"placement.groups": split if apart else {"all": everyone}, "optimization.batch_size": batch}
        recipe = changed(self._recipe, keys)
        speed = Roofline(self._device, self._networks, self._device.links(network))
        return Row(gpus, network, batch, time.estimate(recipe, check_placement(recipe), self._networks, speed))

    def rows(self, batch: int | None, *, apart: bool = False) -> list[Row]:
        """All clusters, for one batch or (None) for so many images per GPU."""
        return [
            self.row(gpus, network, batch or IMAGES_PER_GPU * gpus, apart=apart)
            for network in NETWORKS
            for gpus in GPUS
            if gpus > 8 or network == NETWORKS[0]  # one machine has no network
        ]


def table(rows: list[Row]) -> Iterator[str]:
    """Markdown."""
    yield "| GPUs | network, Gb/s | batch | step, s | images/s | of ideal | exposed communication, s | waiting |"
    yield "|---:|---:|---:|---:|---:|---:|---:|---|"
    one = next(row for row in rows if row.gpus == 8)
    for row in rows:
        network = f"{row.network:,}" if row.gpus > 8 else "-"
        ideal = row.images / (one.images * row.gpus / one.gpus)
        seconds = row.seconds
        cells = (row.gpus, network, row.batch, f"{seconds.step:.3g}", f"{row.images:.3g}", f"{ideal:.0%}")
        yield f"| {' | '.join(map(str, cells))} | {seconds.exposed:.2g} | {row.waiting} |"


def shares(rows: list[Row]) -> Iterator[str]:
    """Markdown: by role, the share of the step that devices compute for it, and that they exchange data."""
    roles = list(dict.fromkeys(role for row in rows for (_, role) in row.seconds.timeline.busy()))
    yield (
        "| | "
        + " | ".join(f"{row.gpus} GPUs" + (f", {row.network} Gb/s" if row.gpus > 8 else "") for row in rows)
        + " |"
    )
    yield "|---|" + "---:|" * len(rows)
    for role in roles:
        spent = (sum(s for (_, r), s in row.seconds.timeline.busy().items() if r == role) for row in rows)
        cells = (f"{value / row.seconds.step:.0%}" for value, row in zip(spent, rows, strict=True))
        yield f"| {role} | {' | '.join(cells)} |"
    yield f"| exchanging data | {' | '.join(f'{row.communicating:.0%}' for row in rows)} |"


def draw(rows: list[Row], name: str) -> str:
    """Images per second over GPUs, one curve per network, as a page of its own."""
    one = next(row for row in rows if row.gpus == 8)
    series: dict[str, tuple[list[float], list[float]]] = {
        "ideal": (list(map(float, GPUS)), [one.images * gpus / 8 for gpus in GPUS])
    }
    for network in reversed(NETWORKS):
        mine = [one, *(row for row in rows if row.network == network and row.gpus > 8)]
        series[f"{network:,} Gb/s"] = ([float(row.gpus) for row in mine], [row.images for row in mine])
    return plots.standalone(plots.curves(series, "GPUs", "images per second", name))


def main() -> None:
    """Print tables and write plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/di_star_pickscore.yaml"))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path, help="folder of the plots")
    args = parser.parse_args()
    recipe = reading.load(args.recipe, args.overrides)
    scaling, batch = Scaling(recipe), recipe.optimization.batch_size
    kinds: Mapping[str, list[Row]] = {
        f"batch {batch}": scaling.rows(batch),
        f"{IMAGES_PER_GPU} images per GPU": scaling.rows(None),
        f"batch {batch}, two groups": scaling.rows(batch, apart=True),
    }
    for title, rows in kinds.items():
        print(f"\n{title}\n", *table(rows), sep="\n")
    chosen = [scaling.row(8, 400, batch), *(scaling.row(64, network, batch) for network in (400, 100))]
    print("\nshares of the step\n", *shares(chosen), sep="\n")
    if args.out:
        for name, rows in zip(("scaling_batch", "scaling_per_gpu"), kinds.values(), strict=False):
            (args.out / f"{name}.svg").write_text(draw(rows, name), "utf-8")


if __name__ == "__main__":
    main()
