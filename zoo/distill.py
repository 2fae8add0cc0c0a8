"""Make emoji64's one-step generator, after zoo.reference.

1. ``python -m zoo.distill warmup``: regression on the reference's own samples.
2. ``rlhf-t2i run zoo/recipes/distill.yaml --out zoo/work/distill``: this project's loop, without a reward.
3. ``python -m zoo.distill export zoo/work/distill``: to ``zoo/emoji64/generator``, in fp16.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from rich.progress import track
from rlhf_t2i.families.conditioning import Conditioner
from rlhf_t2i.families.networks import one_step
from torch import Tensor, nn

from rlhf_t2i.algorithm.schedules import NoiseSchedule
from zoo import data
from zoo.training import join, train

TIMESTEP, GUIDANCE, SOLVER_STEPS = 399, 3.0, 8


@torch.no_grad()
def solve(pipeline: StableDiffusionXLPipeline, prompts: list[str], rank: int) -> dict[str, Tensor]:
    """Noise z and the reference's samples x0 [N, 4, 16, 16] from it (DPM-Solver++, guided)."""
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", algorithm_type="dpmsolver++"
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(rank))
    found = []
    for start in track(range(0, len(prompts), 40), description="pairs", disable=rank > 0):
        part = slice(start, start + 40)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(
                pipeline(
                    prompts[part], num_inference_steps=SOLVER_STEPS, guidance_scale=GUIDANCE, height=data.SIZE,
                    width=data.SIZE, latents=noise[part].clone(), output_type="latent",
                ).images.float()
            )  # fmt: skip
    return {"z": noise, "x0": torch.cat(found)}


def warmup(pairs: int, steps: int, minutes: float) -> None:
    """Regress the reference's samples from their noise in one step (as DMD2 starts), on every name."""
    rank, ranks = join()
    pipeline = StableDiffusionXLPipeline.from_pretrained(data.ROOT / "reference", dtype=torch.float32)
    every = [data.prompt(name, colour) for name in data.load().names for colour in data.COLOURS]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(5)).tolist()
    prompts = [every[order[i % len(order)]] for i in range(pairs)][rank::ranks]
    schedule = NoiseSchedule.from_scheduler(pipeline.scheduler)
    path = data.WORK / f"pairs_{rank}_of_{ranks}.pt"
    if not path.is_file():
        torch.save(solve(pipeline, prompts, rank), path)
    stored = torch.load(path, weights_only=True)
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
    conditioner = Conditioner(tokenizers, [pipeline.text_encoder, pipeline.text_encoder_2], data.SIZE, True)
    modules = nn.ModuleDict({"unet": pipeline.unet.requires_grad_(True).train()})

    def loss(number: int) -> Tensor:
        index = torch.randint(len(prompts), (16,), generator=torch.Generator().manual_seed(number))
        cond = conditioner.encode([prompts[i] for i in index])
        x0 = one_step(modules["unet"], stored["z"][index], cond, TIMESTEP, schedule, torch.bfloat16)
        return F.smooth_l1_loss(x0, stored["x0"][index], beta=0.5)

    average = train("warmup", modules, loss, steps=steps, minutes=minutes, lr=4e-4, ema_decay=0.99, warmup=50)
    if rank == 0:
        average["unet"].save_pretrained(data.WORK / "warm_generator")


def export(run: Path) -> None:
    """The generator of a run, in fp16."""
    unet = UNet2DConditionModel.from_pretrained(run / "model/unet", torch_dtype=torch.float32)
    unet.half().save_pretrained(data.ROOT / "generator")


def main() -> None:
    """Warm up, or export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    warm = commands.add_parser("warmup")
    warm.add_argument("--pairs", type=int, default=2000)
    warm.add_argument("--steps", type=int, default=1500)
    warm.add_argument("--minutes", type=float, default=math.inf, help="end the training (and its schedule) by then")
    commands.add_parser("export").add_argument("run", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.command == "warmup":
        warmup(args.pairs, args.steps, args.minutes)
    else:
        export(args.run)


if __name__ == "__main__":
    main()
