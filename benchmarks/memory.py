"""Measure the memory of every role on this machine and put it beside what ``rlhf-t2i plan`` predicts.

``python benchmarks/memory.py`` builds a UNet of about 70 million parameters in SDXL's layout and trains two updates of
each trained role under every setting of the table, in one process; then it compares the growth of a Ray actor's peak
resident memory between small and mid-size networks with the growth that was predicted.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path

import random_models
import torch
from gpu_sections import Settings, batch, build, join_alone, load
from role_memory import MeasuredWorker, Row, compare, markdown

from rlhf_t2i.recipe.schema import ROLES, Recipe
from rlhf_t2i.roles.assistant import AssistantRole
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.roles.worker import WorkerSpec
from rlhf_t2i.tools.planning import plan

_BF16 = "optimization.precision=bf16"
CASES: dict[str, list[str]] = {
    "placement: local, fp32": ["placement=local"],
    "ZeRO-0, fp32": ["optimization.zero_stage=0"],
    "ZeRO-1, fp32": ["optimization.zero_stage=1"],
    "ZeRO-2, fp32": ["optimization.zero_stage=2"],
    "ZeRO-3, fp32": ["optimization.zero_stage=3"],
    "ZeRO-0, bf16": ["optimization.zero_stage=0", _BF16],
    "ZeRO-1, bf16": ["optimization.zero_stage=1", _BF16],
    "ZeRO-2, bf16": ["optimization.zero_stage=2", _BF16],
    "ZeRO-3, bf16": ["optimization.zero_stage=3", _BF16],
    "ZeRO-2, bf16, offload": ["optimization.zero_stage=2", _BF16, "optimization.offload_optimizer=true"],
    "ZeRO-2, fp32, generator's adapters": ["optimization.generator.lora={rank: 16}"],
}


def measure(recipe: Recipe) -> list[Row]:
    """Train two updates and compare."""
    distributed = recipe.placement.mode == "ray"
    worker = MeasuredWorker(WorkerSpec(recipe, "all", ROLES, distributed=distributed))
    worker.connect({})
    for number in range(2):
        worker.train_once(number, batch(recipe, number))
    worker.measure_activations(batch(recipe, 0)[:1])
    return compare(recipe, worker)


def resident(settings: Settings) -> tuple[int, int]:
    """(predicted, peak resident bytes) of a Ray actor that holds all roles, after two updates."""
    from rlhf_t2i.cluster.ray_cluster import RayCluster

    recipe = load(settings)
    (group,) = plan.make(recipe).groups
    cluster = RayCluster(recipe)
    try:
        for number in range(2):
            cluster.call_all("assistant", AssistantRole.train, number, batch(recipe, number))
            cluster.call_all("learner", LearnerRole.step, number, batch(recipe, number))
        (reading,) = cluster.readings().values()
    finally:
        cluster.close()
    return group.memory.device + group.memory.host, reading.memory


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=96, help="of the UNet's first level")
    parser.add_argument("--cases", default="", help="names of cases that contain this")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    join_alone()
    with tempfile.TemporaryDirectory() as place:
        tiny, large = (Settings(True, str(Path(place) / name), steps=2, batch=2) for name in ("tiny", "large"))
        build(tiny)
        build(large, random_models.small(args.channels, vae_channels=64, resolution=128))
        every: dict[str, list[Row]] = {}
        for name, overrides in CASES.items():
            if args.cases in name:
                every[name] = measure(load(large, *overrides))
                gc.collect()
                print(f"\n{name}\n\n{markdown(every[name])}", flush=True)
        print("| | states predicted, MB | measured | ratio | peak predicted, MB | measured | ratio |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for name, rows in every.items():
            found = {row.kind: row for row in rows if row.role == "all"}
            cells = [
                f"{row.predicted / 1e6:.0f} | {row.measured / 1e6:.0f} | {row.ratio:.3f}"
                for row in (found["states"], found["peak"])
            ]
            print(f"| {name} | {' | '.join(cells)} |")
        if not args.no_ray:
            (small_told, small_found), (told, found) = resident(tiny), resident(large)
            grown, predicted = found - small_found, told - small_told
            print(
                f"\nRay actor, ZeRO-2, fp32: peak resident memory {small_found / 1e6:.0f} MB with small networks, "
                f"{found / 1e6:.0f} MB with these; growth {grown / 1e6:.0f} MB, predicted {predicted / 1e6:.0f} MB, "
                f"ratio {grown / predicted:.3f}"
            )
        if args.json:
            data = {name: [vars(row) for row in rows] for name, rows in every.items()}
            args.json.write_text(json.dumps(data, indent=1), "utf-8")


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    main()
