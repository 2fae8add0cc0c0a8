"""Compare measured memory of every ZeRO stage, activations excluded, with ``rlhf_t2i.tools.planning.zero``.

``python benchmarks/zero_memory.py`` trains a stack of linear layers with the project's own engine on the CPU, over one
and over two gloo ranks, and prints bytes a parameter: what stays, the peak of a whole update over it, and which moment
the plan holds responsible.
"""

from __future__ import annotations

import argparse
import os
import socket
from typing import Any

import torch
from role_memory import live, peak
from torch import distributed, nn

from rlhf_t2i.engines import deepspeed as engines
from rlhf_t2i.recipe.schema import Optimization
from rlhf_t2i.tools.planning import zero

LAYERS, WIDTH = 15, 400
"""15 layers over two ranks: shares end inside a layer, as in a real network; 160,000 weights are divided by ZeRO-3."""
_REPEATS = 4
SMALL = 300
"""Width of layers that ZeRO-3 does not divide."""


class Stack(nn.Module):
    """Linear layers that keep next to no activations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, width] to the same."""
        return self.layers(x)


def cases(ranks: int) -> list[tuple[zero.Setting, int]]:
    """(setting, width of the layers) for so many ranks; the bucket holds the network, or 0.3 of it."""
    whole = LAYERS * WIDTH**2
    part = int(0.3 * whole)

    def case(stage: int, precision: str, bucket: int = whole, **more: bool) -> tuple[zero.Setting, int]:
        return zero.Setting(ranks, stage, precision, bucket, **more), WIDTH

    found = [case(0, "fp32"), case(0, "bf16")]
    for stage in (1, 2, 3):
        found += [case(stage, precision, bucket) for precision in ("fp32", "bf16") for bucket in (whole, part)]
        found.append(case(stage, "bf16", part, accumulates=True))
        found += [case(stage, "bf16", bucket, offload=True) for bucket in (whole, part)]
        found.append(case(stage, "bf16", part, offload=True, accumulates=True))
    found.append((zero.Setting(ranks, 3, "bf16", LAYERS * SMALL**2), SMALL))
    return found


def measure(setting: zero.Setting, width: int) -> tuple[int, int]:
    """(bytes that stay after an update, peak of an update over them)."""
    engines.REDUCE_BUCKET = setting.bucket
    optimization = Optimization.model_validate(
        {"zero_stage": setting.stage, "precision": setting.precision, "offload_optimizer": setting.offload}
    )
    before = live("cpu")
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    module = Stack(width).to(dtype)
    steps = 2 if setting.accumulates else 1
    engine: Any = engines.DeepSpeedEngine(module, optimization.generator, steps, 1, optimization)
    engine._at_start = None  # the sample that bf16's drift is read from
    inputs = torch.randn(1, width).to(dtype)

    def update() -> None:
        for _ in range(steps):
            engine.backward(engine(inputs).float().square().mean())
        engine.step(1e-4)

    update()  # allocates the moments
    update()
    held = live("cpu") - before - inputs.nbytes
    # Gloo's threads let go of a tensor a little after its reduction: the least of several is what was needed.
    highest = min(peak(update) for _ in range(_REPEATS))
    return held, highest


def predicted(setting: zero.Setting, width: int) -> tuple[int, int, str]:
    """What the plan says to :func:`measure`, and its worst moment."""
    sizes = zero.Sizes(LAYERS * width**2, width**2, LAYERS * width**2 if width**2 <= zero.UNDIVIDED else 0)
    items = zero.terms(sizes, setting)
    stays = sum(zero.total(items, when) for when in ("weights", "states", "host"))
    moments: dict[str, int] = {when: zero.total(items, when) for when in ("backward", "reduction", "update")}
    number = zero.BYTES[setting.precision]  # what gloo copies and NCCL does not:
    if setting.stage == 3:
        moments["gloo's reduce-scatter"] = number * (2 * setting.bucket + sizes.largest)
    elif setting.stage and setting.ranks > 1:
        moments["gloo's all-gather"] = number * sizes.total
    worst = max(moments, key=lambda when: moments[when])
    return stays, moments[worst], worst


def _rank(rank: int, ranks: int, port: int, chosen: list[tuple[zero.Setting, int]]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    engines.import_deepspeed().init_distributed("gloo", verbose=False)
    for setting, width in chosen:
        found = torch.tensor(measure(setting, width))
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        if rank == 0:
            stays, peak, worst = predicted(setting, width)
            count = LAYERS * width**2
            cells = [stays, int(found[0]), peak, int(found[1])]
            values = " | ".join(f"{cell / count:.2f}" for cell in cells)
            print(f"| {name(setting, width)} | {values} | {int(found[1]) / peak:.2f} | {worst} |", flush=True)
    distributed.destroy_process_group()


def name(setting: zero.Setting, width: int) -> str:
    """A row's label."""
    share = "" if setting.bucket >= LAYERS * width**2 else ", bucket 0.3"
    return (
        f"ZeRO-{setting.stage}, {setting.ranks} rank{'s' * (setting.ranks > 1)}, {setting.precision}"
        + ", offload" * setting.offload
        + ", accumulating" * setting.accumulates
        + share
        + ", small layers" * (width == SMALL)
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose label contains this")
    args = parser.parse_args()
    print("| setting | stays, predicted | measured | peak, predicted | measured | measured / predicted | moment |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for ranks in (1, 2):
        chosen = [case for case in cases(ranks) if args.only in name(*case)]
        if not chosen:
            continue
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(_rank, (ranks, port, chosen), nprocs=ranks)


if __name__ == "__main__":
    main()
